"""`shards stat`: what is in the shards, from their records alone; no image is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from cllip_fast.data.decode import MAX_PIXELS
from cllip_fast.data.record import Record, RecordError
from cllip_fast.data.shards import ShardReader
from cllip_fast.data.tokenizer import Tokenizer, load_tokenizer
from cllip_fast.shard_tools.files import printable
from cllip_fast.shard_tools.samples import find_samples, read_record

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_UNKNOWN = "unknown"
_TEXTS = 4096  # tokenised at a time


@dataclass
class Statistics:
    """What records say. Memory grows with the number of different region texts, not with that of images.

    Attributes:
        shards, images, captions, regions: how many.
        left_out: shards, samples and regions that training would skip, by kind, as far as records show them.
        quantities: name -> how often each value occurs. Lengths of texts are in characters or tokens (start and end
            included), sizes in pixels, the aspect ratio (width / height) is rounded to 0.01, the area of a box
            is a share of its image's in %, rounded to 0.01.
        region_texts, sources, licences: how often each occurs; of a source that is an address, its host counts.
    """

    shards: int = 0
    images: int = 0
    captions: int = 0
    regions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    quantities: dict[str, Counter[float]] = field(default_factory=dict)
    region_texts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)

    def count(self, quantity: str, value: float, times: int = 1) -> None:
        """Add a value of a quantity."""
        self.quantities.setdefault(quantity, Counter())[value] += times

    def as_text(self, most: int = 10) -> str:
        """A table of the quantities, and the `most` frequent region texts, sources and licences."""
        lines = [f"{self.shards} shards, {self.images} images, {self.captions} captions, {self.regions} regions"]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{n} × {kind}" for kind, n in self.left_out.most_common()))
        summaries = {name: summarise(counts) for name, counts in self.quantities.items()}
        if summaries:
            rows = [["", *next(iter(summaries.values()))]]
            rows += [[name, *(f"{value:.6g}" for value in values.values())] for name, values in summaries.items()]
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines.append("")
            for first, *rest in rows:
                numbers = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
                lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        for title, counts in self._texts().items():
            if counts:
                lines.append(f"\n{title} ({len(counts)} different)")
                lines += [f"  {n:>8}  {printable(text)[:100]}" for text, n in counts.most_common(most)]
        return "\n".join(lines)

    def as_dict(self, most: int = 1000) -> dict[str, Any]:
        """For JSON: the same numbers, with the `most` frequent texts."""
        totals = {name: getattr(self, name) for name in ("shards", "images", "captions", "regions")}
        quantities = {name: summarise(counts) for name, counts in self.quantities.items()}
        texts = {
            title.replace(" ", "_"): {"different": len(counts), "most_frequent": dict(counts.most_common(most))}
            for title, counts in self._texts().items()
        }
        return totals | {"left_out": dict(self.left_out), "quantities": quantities} | texts

    def _texts(self) -> dict[str, Counter[str]]:
        return {"region texts": self.region_texts, "sources": self.sources, "licences": self.licences}


def gather_statistics(paths: list[Path], tokenizer: str | Path | None = None) -> Statistics:
    """Read every record of `paths`; what training would skip is counted and left out. Shows a progress bar.

    Args:
        tokenizer: as for `load_tokenizer`, to count tokens too.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    found = Statistics(shards=len(paths))
    for path in tqdm(paths, desc="reading records", unit=" shards", delay=2, leave=False):
        samples, faults = find_samples(path)
        found.left_out.update(fault.kind for fault in faults)
        reader, captions = ShardReader([path]), []
        for sample in samples:
            try:
                record, value = read_record(reader, sample)
            except RecordError as error:
                found.left_out[error.kind] += 1
                continue
            if record.width * record.height > MAX_PIXELS:
                found.left_out["too many pixels"] += 1
                continue
            found.left_out.update(kind for kind, _ in record.problems)
            _add_record(found, record, value)
            captions += record.captions
        _add_texts(found, "caption", Counter(captions), loaded)
    _add_texts(found, "region text", found.region_texts, loaded)
    return found


def summarise(counts: Mapping[float, int]) -> dict[str, float]:
    """Mean, least, percentiles (nearest rank: values that occur) and greatest of values with their frequencies."""
    values = np.array(sorted(counts))
    frequencies = np.array([counts[value] for value in values.tolist()])
    below = np.cumsum(frequencies)
    ranks = [-(-percent * below[-1] // 100) for percent in _PERCENTILES]
    at = values[np.searchsorted(below, ranks)]
    summary = {"mean": float(values @ frequencies / below[-1]), "min": values[0].item()}
    return summary | {f"p{p}": v.item() for p, v in zip(_PERCENTILES, at, strict=True)} | {"max": values[-1].item()}


def _add_record(found: Statistics, record: Record, value: dict[str, Any]) -> None:
    found.images += 1
    found.captions += len(record.captions)
    found.regions += len(record.boxes)
    found.count("regions an image", len(record.boxes))
    found.count("captions an image", len(record.captions))
    found.count("image width", record.width)
    found.count("image height", record.height)
    found.count("aspect ratio", round(record.width / record.height, 2))
    for x0, y0, x1, y1 in record.boxes:
        found.count("box area, %", round(100 * (x1 - x0) * (y1 - y0) / (record.width * record.height), 2))
    found.region_texts.update(record.phrases)
    found.sources[_origin(value.get("source"))] += 1
    licence = value.get("licence")
    found.licences[licence if isinstance(licence, str) else _UNKNOWN] += 1


def _add_texts(found: Statistics, name: str, texts: Counter[str], tokenizer: Tokenizer | None) -> None:
    for text, times in texts.items():
        found.count(f"{name}, characters", len(text), times)
    if tokenizer is not None:
        distinct = list(texts)
        for start in range(0, len(distinct), _TEXTS):
            part = distinct[start : start + _TEXTS]
            for text, tokens in zip(part, _token_counts(tokenizer, part), strict=True):
                found.count(f"{name}, tokens", tokens, texts[text])


def _token_counts(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Lengths before any cut: rows are made longer until the end token stands before the last place."""
    counts, left, length = np.zeros(len(texts), dtype=np.int64), np.arange(len(texts)), 64
    while len(left):
        rows = tokenizer.rows([texts[i] for i in left], length)
        counts[left] = length - (rows[:, ::-1] != tokenizer.pad_id).argmax(axis=1)
        left, length = left[counts[left] == length], 4 * length
    return counts.tolist()


def _origin(source: object) -> str:
    """The host of an address, since addresses differ for each image; any other text as it is."""
    if not isinstance(source, str):
        return _UNKNOWN
    try:
        return urlsplit(source).netloc or source
    except ValueError:  # such as half of an IPv6 address
        return source
