"""Pascal VOC: an XML file an image, whose class names become region texts.

Layout (host.robots.ox.ac.uk/pascal/VOC, the development kit): `Annotations/*.xml` with `filename`, `size` and `object`s
of `name` and `bndbox`; `JPEGImages/`; `ImageSets/Main/*.txt` with an image's name at the start of each line. Pixels
count from 1 and both ends belong to the box, so that xmin..xmax is xmin - 1 to xmax here. Difficult and truncated
objects are kept, the boxes of their parts (`part`) are not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from cllip_fast.convert.files import check_folder, read_lines, read_xml, to_number
from cllip_fast.convert.sample import Region, Sample, Source, listed
from cllip_fast.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of the XML files")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
    parser.add_argument("--ids", type=Path, metavar="TXT", help="only images in this list (default: all)")


def read(annotations: Path, images: Path, ids: Path | None = None) -> Source:
    """Read VOC's files; `InputError` if one is missing or malformed."""
    check_folder("images", images)
    files = list_files(annotations, "annotations", ".xml", ids)
    source = Source("voc", (), images, total=len(files))
    source.samples = _samples(files, source.classes)
    return source


def list_files(folder: Path, name: str, suffix: str, ids: Path | None) -> list[Path]:
    """The files of a folder with one for each image, sorted; only those that the list `ids` names if there is one.

    Raises:
        InputError: the folder does not exist, holds no such file, or lacks a file that `ids` names.
    """
    files = {path.stem: path for path in sorted(check_folder(name, folder).glob(f"*{suffix}"))}
    if not files:
        raise InputError(f"{name} folder {folder} holds no *{suffix} file")
    if ids is None:
        return list(files.values())
    wanted = {line.split()[0] for line in read_lines(ids)}
    missing = sorted(wanted - files.keys())
    if missing:
        raise InputError(f"{ids} names {missing[0]!r}, but {folder} holds no {missing[0]}{suffix}")
    return [path for stem, path in files.items() if stem in wanted]


def image_size(root: Element) -> tuple[int, int] | None:
    """Width and height that an annotation records; None where it says nothing, or 0 as some tools write."""
    values = [root.findtext(f"size/{name}", "").strip() for name in ("width", "height")]
    width, height = (int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0 for value in values)
    return (width, height) if width and height else None


def pixel_box(place: str, bndbox: Element) -> tuple[float, float, float, float]:
    """A `bndbox` as x0, y0, x1, y1 from 0, with the far ends excluded."""
    names = ("xmin", "ymin", "xmax", "ymax")
    x0, y0, x1, y1 = (to_number(f"{place}: {name}", bndbox.findtext(name)) for name in names)
    return x0 - 1, y0 - 1, x1, y1


def _samples(files: list[Path], classes: list[str]) -> Iterator[Sample]:
    for path in files:
        root = read_xml(path)
        image = root.findtext("filename", "").strip()
        if not image:
            raise InputError(f"{path} has no filename, expected a Pascal VOC annotation")
        regions = []
        for number, entry in enumerate(root.findall("object")):
            place = f"{path}: object[{number}]"
            name, bndbox = entry.findtext("name", "").strip(), entry.find("bndbox")
            if not name or bndbox is None:
                raise InputError(f"{place} has no name or no bndbox")
            regions.append(Region(pixel_box(place, bndbox), name))
            if name not in classes:
                classes.append(name)
        yield Sample(path.stem, image, [listed(region.text for region in regions)], regions, image_size(root))
