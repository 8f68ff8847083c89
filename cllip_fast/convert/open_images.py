"""Open Images: boxes of 600 classes, whose names become region texts.

Layout (storage.googleapis.com/openimages/web/download_v7.html, the same from V4 on): a CSV of boxes with the columns
ImageID, LabelName, XMin, XMax, YMin, YMax in [0, 1] of width and height, and IsGroupOf; a CSV of "/m/011k07,Tortoise"
lines, with the header LabelName,DisplayName or without; the images <ImageID>.jpg. The rows of an image follow one
another, as they do in the official files. Boxes around groups (IsGroupOf) are skipped. There are no captions: the class
names become one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cllip_fast.convert.files import check_folder, read_text, to_number
from cllip_fast.convert.sample import Region, Sample, Source, listed
from cllip_fast.errors import InputError

_BOX = ("XMin", "YMin", "XMax", "YMax")
_COLUMNS = ("ImageID", "LabelName", "IsGroupOf", *_BOX)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--boxes", type=Path, required=True, metavar="CSV", help="as oidv6-train-annotations-bbox.csv")
    parser.add_argument("--names", type=Path, required=True, metavar="CSV", help="as class-descriptions-boxable.csv")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")


def read(boxes: Path, names: Path, images: Path) -> Source:
    """Read Open Images' files; `InputError` if one is missing or malformed."""
    check_folder("images", images)
    classes = _read_names(names)
    skipped: Counter[str] = Counter()
    samples = _samples(boxes, classes, skipped)
    return Source("open-images", samples, images, list(classes.values()), skipped=skipped)


def _read_names(path: Path) -> dict[str, str]:
    names = {}
    for number, row in enumerate(csv.reader(read_text(path).splitlines()), 1):
        if len(row) != 2 or not all(row):
            raise InputError(f"{path}: line {number} is {','.join(row)[:80]!r}, expected a label and its name")
        names[row[0]] = row[1]
    names.pop("LabelName", None)  # the header, in V7
    return names


def _samples(path: Path, names: dict[str, str], skipped: Counter[str]) -> Iterator[Sample]:
    done: set[str] = set()
    for image, rows in itertools.groupby(_rows(path), key=lambda row: row[1]["ImageID"]):
        if image in done:
            raise InputError(f"{path}: the rows of {image!r} are not together; sort the file by ImageID")
        done.add(image)
        regions = []
        for number, row in rows:
            if row["IsGroupOf"] == "1":  # -1: nobody looked
                skipped["boxes around groups"] += 1
            elif row["LabelName"] not in names:
                skipped["boxes of an unknown class"] += 1
            else:
                box = [to_number(f"{path}: line {number}: {name}", row[name]) for name in _BOX]
                regions.append(Region(tuple(box), names[row["LabelName"]]))
        yield Sample(image, f"{image}.jpg", [listed(region.text for region in regions)], regions, relative=True)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of each box."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path} has no column {missing[0]}, expected {', '.join(_COLUMNS)}")
            for row in reader:
                if not row["ImageID"] or None in (row[name] for name in _COLUMNS):
                    raise InputError(f"{path}: line {reader.line_num} is cut short")
                yield reader.line_num, row
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV file: {error}") from error
