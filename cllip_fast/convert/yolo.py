"""YOLO: a text file an image, whose class names become region texts.

Layout (github.com/AlexeyAB/darknet, docs.ultralytics.com/datasets/detect): folders `images` and `labels` with the same
names below them; a label file has a line "class cx cy width height" for each box, the class counted from 0, the rest in
[0, 1] of width and height, and in detectors' output a confidence behind; a names file with a class a line. There are no
captions: the class names become one, so images without a box are skipped.
"""

from __future__ import annotations

import argparse
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cllip_fast.convert.files import check_folder, read_text, to_number
from cllip_fast.convert.images import list_images
from cllip_fast.convert.sample import Region, Sample, Source, listed
from cllip_fast.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
    parser.add_argument("--labels", type=Path, required=True, metavar="DIR", help="folder of the label files")
    parser.add_argument("--names", type=Path, required=True, metavar="TXT", help="class names, one a line")


def read(images: Path, labels: Path, names: Path) -> Source:
    """Read YOLO's files; `InputError` if one is malformed."""
    check_folder("images", images)
    check_folder("labels", labels)
    classes = [line.strip() for line in read_text(names).rstrip().splitlines()]
    if not all(classes):
        raise InputError(f"{names}: line {classes.index('') + 1} is empty, expected a class name")
    files = list_images(images)
    skipped: Counter[str] = Counter()
    return Source("yolo", _samples(files, labels, classes, skipped), images, classes, len(files), skipped)


def _samples(files: list[str], labels: Path, classes: list[str], skipped: Counter[str]) -> Iterator[Sample]:
    for name in files:
        key = str(PurePosixPath(name).with_suffix(""))
        path = labels / f"{key}.txt"
        if not path.is_file():
            skipped["images without a label file"] += 1
            continue
        regions = _read_regions(path, classes)
        yield Sample(key, name, [listed(region.text for region in regions)], regions, relative=True)


def _read_regions(path: Path, classes: list[str]) -> list[Region]:
    regions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        place = f"{path}: line {number}"
        if len(words) not in (5, 6):
            raise InputError(
                f"{place} has {len(words)} numbers, expected class, cx, cy, width, height and maybe a score"
            )
        if not (words[0].isascii() and words[0].isdigit() and len(words[0]) < 10 and int(words[0]) < len(classes)):
            raise InputError(f"{place} has class {reprlib.repr(words[0])}, expected 0 to {len(classes) - 1}")
        cx, cy, width, height, *score = (to_number(place, word) for word in words[1:])
        if score and not 0 <= score[0] <= 1:
            raise InputError(f"{place} has score {score[0]}, expected 0 to 1")
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        regions.append(Region(box, classes[int(words[0])], *score))
    return regions
