"""The one writer behind all converters: checks each sample against its image and writes it to train or val shards."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cllip_fast.convert.images import UnusableImageError, read_image, to_jpeg
from cllip_fast.convert.sample import Sample, Source
from cllip_fast.convert.schema import find_violation
from cllip_fast.data.folders import INFO_FILE, TOKENIZER_FILE, completed, locked
from cllip_fast.data.shards import ShardWriter
from cllip_fast.data.tokenizer import train_bpe
from cllip_fast.errors import InputError

_VOCABULARY = 8192
_TOKENIZER_TEXTS = 1_000_000  # distinct ones; more change no merge that matters and would not fit into memory
_KEY_LENGTH = 64  # with a hash and a suffix, well below the 100 characters of a tar's header


@dataclass
class ConvertSummary:
    """What a conversion wrote, left out and changed: counts by kind, in the order in which they came up."""

    written: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

        return "\n".join(f"{name} {listed(counts)}" for name, counts in vars(self).items())


def write_shards(source: Source, out: str | Path, *, val_share: float = 0.1, shard_size: int = 1000) -> ConvertSummary:
    """Write a data set to `out` as train and val shards with `dataset.json` and a tokenizer.

    JPEG files are copied as they are, others re-encoded (`to_jpeg`). An image is for validation if a hash of its key
    says so: whatever else is converted, it stays on its side. An image is skipped without a caption, without a file
    inside the images' folder, if it cannot be decoded, is of another size than recorded, or its key came before. A box
    is clipped to the image; one without area, before or after, is skipped, as are empty and repeated regions. All of
    it is counted. Samples are written as they are read, so memory does not grow with the data set but for their keys'
    hashes. The folder appears under its name only when it is complete; the same input gives the same bytes.

    Args:
        source: the data set, from a reader's `read`.
        out: folder to make; must not exist or be empty.
        val_share: chance of an image to be for validation, from 0 to below 1.
        shard_size: images in a shard.

    Raises:
        InputError: an argument is out of range, `out` is not empty, an annotation is malformed, or no image is left.
    """
    if not 0 <= val_share < 1:
        raise InputError(f"val_share is {val_share}, expected from 0 to below 1")
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}, expected at least 1")
    out = Path(out)
    summary = ConvertSummary(written=Counter({"val images": 0, "train images": 0}), skipped=source.skipped)
    licences: Counter[str] = Counter()
    texts: dict[str, None] = {}  # an ordered set
    seen: set[int] = set()
    with locked(out), completed(out) as partial:
        with ShardWriter(partial / "val", shard_size) as val, ShardWriter(partial / "train", shard_size) as train:
            for sample in tqdm(source.samples, desc="writing shards", unit=" images", total=source.total):
                key = _safe_key(sample.key)
                number = _hash(key)
                try:
                    if number in seen:
                        raise UnusableImageError("images with a key that came before")
                    jpeg, record = _finish(sample, source.images, summary)
                except UnusableImageError as error:
                    summary.skipped[str(error)] += 1
                    continue
                violation = find_violation(record)
                if violation is not None:
                    raise InputError(f"sample {sample.key!r} does not fit sample.schema.json: {violation}")
                seen.add(number)
                is_val = number < val_share * 2**64
                (val if is_val else train).write(key, jpeg, record)
                _count(record, "val" if is_val else "train", summary, licences)
                if not is_val and len(texts) < _TOKENIZER_TEXTS:
                    texts |= dict.fromkeys(record["captions"] + [region["text"] for region in record["regions"]])
        if not seen:
            raise InputError(f"no image to convert; skipped: {dict(summary.skipped)}")
        classes = [text for text in dict.fromkeys(map(_clean, source.classes)) if text]
        train_bpe([*texts, *classes], _VOCABULARY).save(partial / TOKENIZER_FILE)
        info = {
            "name": source.name,
            "splits": {split: summary.written[f"{split} images"] for split in ("val", "train")},
            "licences": dict(licences.most_common()),
            "classes": classes,
            "attributes": None,
        }
        (partial / INFO_FILE).write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def _finish(sample: Sample, folder: Path | None, summary: ConvertSummary) -> tuple[bytes, dict[str, Any]]:
    """The JPEG file and the record of one sample."""
    captions = [text for text in map(_clean, sample.captions) if text]
    if not captions:
        raise UnusableImageError("images without a caption")
    data = sample.image if isinstance(sample.image, bytes) else read_image(folder, sample.image)
    jpeg, size = to_jpeg(data)
    if sample.size not in (None, size):
        raise UnusableImageError("images of another size than recorded")
    if jpeg is not data:
        summary.changed["images re-encoded as JPEG"] += 1
    record = {"captions": captions, "regions": _regions(sample, size, summary), "width": size[0], "height": size[1]}
    credit = {"source": sample.source, "licence": sample.licence}
    return jpeg, record | {name: text for name, text in credit.items() if text}


def _regions(sample: Sample, size: tuple[int, int], summary: ConvertSummary) -> list[dict[str, Any]]:
    limits = size * 2
    regions: dict[tuple[Any, ...], dict[str, Any]] = {}
    for region in sample.regions:
        text = _clean(region.text)
        if not text:
            summary.skipped["regions without a text"] += 1
            continue
        scales = limits if sample.relative else (1, 1, 1, 1)
        # Rounding comes first, so that what is left of a box still has an area. Adding 0.0 makes -0.0 zero.
        box = [round(value * scale, 2) + 0.0 for value, scale in zip(region.box, scales, strict=True)]
        if not _has_area(box):
            summary.skipped["boxes without area"] += 1
            continue
        clipped = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits, strict=True)]
        if not _has_area(clipped):
            summary.skipped["boxes outside the image"] += 1
            continue
        if (*clipped, text) in regions:
            summary.skipped["regions given twice"] += 1
            continue
        if clipped != box:
            summary.changed["boxes clipped to the image"] += 1
        score = {} if region.score is None else {"score": round(region.score, 4)}
        regions[*clipped, text] = {"box": clipped, "text": text} | score
    return list(regions.values())


def _has_area(box: list[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _count(record: dict[str, Any], split: str, summary: ConvertSummary, licences: Counter[str]) -> None:
    summary.written[f"{split} images"] += 1
    summary.written["regions"] += len(record["regions"])
    summary.written["captions"] += len(record["captions"])
    licences[record.get("licence", "unknown")] += 1


def _clean(text: str) -> str:
    """White space folded; lone halves of surrogate pairs, which JSON can spell and UTF-8 cannot, removed."""
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def _safe_key(key: str) -> str:
    """A key that a WebDataset member can have: no dots, ASCII, short. A changed key gets a hash, to stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9_/-]", "_", key).strip("/")[:_KEY_LENGTH]
    return safe if safe == key else f"{safe}-{_hash(key):016x}"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
