"""COCO annotation files to shards: class names become region texts, captions become texts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from cllip_fast.data.folders import INFO_FILE, TOKENIZER_FILE, completed, locked, read_json
from cllip_fast.data.shards import ShardWriter
from cllip_fast.data.tokenizer import train_bpe
from cllip_fast.errors import InputError

_VOCABULARY = 8192
_INSTANCES = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
_CAPTIONS = {"annotations": {"image_id": int, "caption": str}}


@dataclass
class ConvertSummary:
    """What a conversion wrote and left out: counts by name, in the order in which they came up."""

    written: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

        return f"wrote {listed(self.written)}\nskipped {listed(self.skipped)}"


def convert_coco(
    instances: str | Path,
    captions: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    val_share: float = 0.1,
    shard_size: int = 1000,
) -> ConvertSummary:
    """Write the images that COCO's two files describe to `out` as train and val shards.

    The images' bytes are copied as they are. Which images are for validation depends on their ids alone. An image is
    skipped without a caption, a file, or if the file is no JPEG of the recorded size; of the boxes, crowds and those
    without area inside the image are. The folder appears under its name only when it is complete.

    Args:
        instances, captions: COCO's annotation files with boxes and with captions.
        images: folder of the image files.
        out: folder to make; must not exist or be empty.
        val_share: share of the images for validation, from 0 to below 1.
        shard_size: images in a shard.

    Raises:
        InputError: a file is missing or not in COCO's form, an argument is out of range, `out` is not empty, or no
            image is left.
    """
    out, images = Path(out), Path(images)
    if not 0 <= val_share < 1:
        raise InputError(f"val_share is {val_share}, expected from 0 to below 1")
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}, expected at least 1")
    if not images.is_dir():
        raise InputError(f"images folder {images} does not exist")
    boxes_file, captions_file = _read_coco(Path(instances), _INSTANCES), _read_coco(Path(captions), _CAPTIONS)
    summary = ConvertSummary()
    with locked(out), completed(out) as partial:
        samples = _usable_images(boxes_file, captions_file, images, summary)
        if not samples:
            raise InputError(f"no image to convert; skipped: {dict(summary.skipped)}")
        samples.sort(key=lambda sample: hashlib.blake2b(sample[0].encode(), digest_size=8).digest())
        val_count = round(val_share * len(samples))
        splits = {"val": samples[:val_count], "train": samples[val_count:]}
        licences: Counter[str] = Counter()
        with tqdm(total=len(samples), desc="writing shards", unit=" images") as bar:
            for split, chosen in splits.items():
                summary.written[f"{split} images"] = len(chosen)
                with ShardWriter(partial / split, shard_size) as writer:
                    for key, path, record in sorted(chosen, key=lambda sample: sample[0]):
                        writer.write(key, path.read_bytes(), record)
                        summary.written["regions"] += len(record["regions"])
                        summary.written["captions"] += len(record["captions"])
                        licences[record.get("licence", "unknown")] += 1
                        bar.update()
        classes = [category["name"] for category in boxes_file["categories"]]
        texts = [text for _, _, record in splits["train"] for text in record["captions"]]
        train_bpe([*texts, *classes], _VOCABULARY).save(partial / TOKENIZER_FILE)
        info = {
            "name": "coco",
            "splits": {split: len(chosen) for split, chosen in splits.items()},
            "licences": dict(licences.most_common()),
            "classes": classes,
            "attributes": None,
        }
        (partial / INFO_FILE).write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def _usable_images(
    boxes_file: dict[str, Any], captions_file: dict[str, Any], folder: Path, summary: ConvertSummary
) -> list[tuple[str, Path, dict[str, Any]]]:
    """(key, image file, record) of each image that can be used; the others are counted."""
    texts, boxes = defaultdict(list), defaultdict(list)
    for annotation in captions_file["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"].strip())
    for annotation in boxes_file["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    names = {category["id"]: category["name"] for category in boxes_file["categories"]}
    licences = {entry.get("id"): entry.get("name") for entry in boxes_file.get("licenses", [])}
    samples: list[tuple[str, Path, dict[str, Any]]] = []
    for image in tqdm(boxes_file["images"], desc="checking images", unit=" images", delay=2):
        captions = [text for text in texts[image["id"]] if text]
        if not captions:
            summary.skipped["images without a caption"] += 1
            continue
        path = folder / image["file_name"]
        size, problem = _image_size(folder, path)
        if size is None:
            summary.skipped[problem] += 1
            continue
        if size != (image.get("width", size[0]), image.get("height", size[1])):
            summary.skipped["images of another size than recorded"] += 1
            continue
        record = {
            "captions": captions,
            "regions": _regions(boxes[image["id"]], names, size, summary),
            "width": size[0],
            "height": size[1],
        }
        source, licence = image.get("flickr_url") or image.get("coco_url"), licences.get(image.get("license"))
        record |= {name: text for name, text in (("source", source), ("licence", licence)) if text}
        samples.append((f"{image['id']:012d}", path, record))
    return samples


def _regions(
    annotations: list[dict[str, Any]], names: dict[int, str], size: tuple[int, int], summary: ConvertSummary
) -> list[dict[str, Any]]:
    """Regions of one image: boxes from (x, y, width, height) to corners, clipped to the image."""
    regions = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            summary.skipped["crowd boxes"] += 1
            continue
        if annotation["category_id"] not in names:
            summary.skipped["boxes of an unknown category"] += 1
            continue
        x, y, width, height = annotation["bbox"]
        box = [max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])]
        if not (box[0] < box[2] and box[1] < box[3]):
            summary.skipped["boxes without area"] += 1
            continue
        regions.append({"box": [round(value, 2) for value in box], "text": names[annotation["category_id"]]})
    return regions


def _image_size(folder: Path, path: Path) -> tuple[tuple[int, int] | None, str]:
    """Width and height of an image file, or None and what it is to be counted as."""
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, "images with a path outside the folder"
    if not path.is_file():
        return None, "images without a file"
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            return image.size, ""
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None, "files that are no JPEG"


def _read_coco(path: Path, wanted: dict[str, dict[str, type]]) -> dict[str, Any]:
    """A COCO file whose lists hold objects with the wanted fields of the wanted types."""
    value = read_json(path)
    for name, fields in wanted.items():
        entries = value.get(name)
        if not isinstance(entries, list):
            raise InputError(f"{path} lacks the list {name!r}, expected a COCO annotation file")
        for entry in entries:
            for field_name, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field_name), kind):
                    start = str(entry)[:80]
                    raise InputError(f"{path}: an entry of {name!r} has no {kind.__name__} {field_name!r}: {start}")
            box = entry.get("bbox", [0] * 4)
            if not (len(box) == 4 and all(type(v) in (int, float) for v in box)):
                raise InputError(f"{path}: an entry of {name!r} has bbox {box!r}, expected x, y, width, height")
    return value
