"""COCO and LVIS: captions, and boxes whose class names become region texts.

Layout (cocodataset.org/#format-data): an instances file with `images`, `annotations` (`bbox` is x, y, width, height in
pixels) and `categories`, a captions file, a folder of images. Crowd boxes are skipped; polygons are not read.

LVIS (lvisdataset.org) is COCO's images with boxes of 1203 classes. Its images have a `coco_url` and no `file_name`: the
file is the URL's end, `val2017/000000000139.jpg`, or `000000000139.jpg` where the images' folder has no `val2017`. Its
captions are COCO's; without --captions the class names become the caption. Underscores in class names become blanks.
Synonyms are not read, nor the lists of classes that an image does not have or of which not all are marked: evaluation
asks about marked boxes only.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllip_fast.convert.files import check_entries, check_entry, check_folder, check_numbers, read_json
from cllip_fast.convert.sample import Region, Sample, Source, listed
from cllip_fast.errors import InputError

_BOXES = {"image_id": int, "category_id": int, "bbox": list}
_INSTANCES = {
    "images": {"id": int},
    "annotations": _BOXES,
    "categories": {"id": int, "name": str},
}
_CAPTIONS = {"annotations": {"image_id": int, "caption": str}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", type=Path, required=True, metavar="JSON", help="instances file: boxes, classes")
    parser.add_argument("--captions", type=Path, metavar="JSON", help="captions file (default: class names instead)")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")


def read(instances: Path, captions: Path | None, images: Path) -> Source:
    """Read COCO's files; `InputError` if one is missing or malformed."""
    check_folder("images", images)
    boxes_file = read_instances(instances, images)
    texts = None if captions is None else read_captions(captions)
    skipped: Counter[str] = Counter()
    classes = [_phrase(category) for category in boxes_file["categories"]]
    samples = _samples(boxes_file, licence_names(instances, boxes_file), texts, skipped)
    return Source("coco", samples, images, classes, len(boxes_file["images"]), skipped)


def read_instances(path: Path, images: Path) -> dict[str, Any]:
    """A checked instances file; its images, which lie in the folder `images`, get the `file_name` that LVIS lacks."""
    value = _read(path, _INSTANCES)
    for number, image in enumerate(value["images"]):
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            *_, folder, name = ["", *image["coco_url"].split("/")]
            image["file_name"] = f"{folder}/{name}" if folder and (images / folder).is_dir() else name
        check_entry(f"{path}: images[{number}]", image, {"file_name": str})
    for number, entry in enumerate(value["annotations"]):
        check_numbers(f"{path}: annotations[{number}].bbox", entry["bbox"], 4)
    return value


def read_captions(path: Path) -> dict[int, list[str]]:
    """The captions of a captions file by image id."""
    captions = defaultdict(list)
    for entry in _read(path, _CAPTIONS)["annotations"]:
        captions[entry["image_id"]].append(entry["caption"])
    return captions


def corners(bbox: list[float]) -> tuple[float, float, float, float]:
    """x, y, width, height as x0, y0, x1, y1."""
    x, y, width, height = bbox
    return x, y, x + width, y + height


def image_facts(image: dict[str, Any], licences: dict[int, str]) -> dict[str, Any]:
    """What an entry of `images` says about size and origin, as fields of a `Sample`."""
    width, height, licence = (image.get(name) for name in ("width", "height", "license"))
    return {
        "size": (width, height) if type(width) is int and type(height) is int else None,
        "source": image.get("flickr_url") or image.get("coco_url"),
        "licence": licences.get(licence) if type(licence) is int else None,
    }


def licence_names(path: Path, instances: dict[str, Any]) -> dict[int, str]:
    """The names of a file's `licenses` by id; not every file has them."""
    entries = check_entries(f"{path}: licenses", instances.get("licenses", []), {"id": int, "name": str})
    return {entry["id"]: entry["name"] for entry in entries}


def _samples(
    instances: dict[str, Any], licences: dict[int, str], captions: dict[int, list[str]] | None, skipped: Counter[str]
) -> Iterator[Sample]:
    names = {category["id"]: _phrase(category) for category in instances["categories"]}
    known = {image["id"] for image in instances["images"]}
    regions = defaultdict(list)
    for entry in instances["annotations"]:
        if entry["image_id"] not in known:
            skipped["boxes of an unknown image"] += 1
        elif entry.get("iscrowd"):
            skipped["crowd boxes"] += 1
        elif entry["category_id"] not in names:
            skipped["boxes of an unknown category"] += 1
        else:
            regions[entry["image_id"]].append(Region(corners(entry["bbox"]), names[entry["category_id"]]))
    for image in sorted(instances["images"], key=lambda image: image["id"]):
        key, found = f"{image['id']:012d}", regions[image["id"]]
        texts = [listed(region.text for region in found)] if captions is None else captions.get(image["id"], [])
        yield Sample(key, image["file_name"], texts, found, **image_facts(image, licences))


def _phrase(category: dict[str, Any]) -> str:
    """A class name as one would write it: LVIS has `bow_(weapon)`."""
    return category["name"].replace("_", " ")


def _read(path: Path, lists: dict[str, dict[str, type]]) -> dict[str, Any]:
    value = read_json(path)
    for name, fields in lists.items():
        if not isinstance(value, dict) or not isinstance(value.get(name), list):
            raise InputError(f"{path} lacks the list {name!r}, expected a COCO annotation file")
        check_entries(f"{path}: {name}", value[name], fields)
    return value
