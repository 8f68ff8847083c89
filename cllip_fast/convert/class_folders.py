"""Class folders: a folder of images for each class, as ImageNet has them; the class name becomes the caption.

Layout (image-net.org; also torchvision's ImageFolder): `<folder>/<any name>.JPEG`. The class is the folder's name with
blanks for underscores, or what a names file says: lines such as ImageNet's "n01440764 tench, Tinca tinca"
(LOC_synset_mapping.txt), of which the first name is taken. There are no regions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cllip_fast.convert.files import check_folder, read_lines
from cllip_fast.convert.images import list_images
from cllip_fast.convert.sample import Sample, Source
from cllip_fast.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the classes' folders")
    parser.add_argument("--names", type=Path, metavar="TXT", help="class names (default: the folders' names)")
    parser.add_argument("--template", default="{}", help="caption around a class name (default %(default)s)")


def read(images: Path, names: Path | None = None, template: str = "{}") -> Source:
    """Read class folders; `InputError` if one has no name in `names`, or `template` has no place for it."""
    if template.count("{}") != 1:
        raise InputError(f"template is {template!r}, expected a text with one {{}} for the class name")
    files = [name for name in list_images(check_folder("images", images)) if "/" in name]
    if not files:
        raise InputError(f"images folder {images} holds no folder with images, expected one for each class")
    folders = list(dict.fromkeys(name.split("/")[0] for name in files))
    known = {folder: folder.replace("_", " ") for folder in folders} if names is None else _read_names(names)
    missing = [folder for folder in folders if folder not in known]
    if missing:
        raise InputError(f"{names} has no line for the folder {missing[0]!r}")
    classes = [known[folder] for folder in folders]
    return Source("class-folders", _samples(files, known, template), images, classes, len(files))


def _read_names(path: Path) -> dict[str, str]:
    names = {}
    for line in read_lines(path):
        folder, _, synonyms = line.partition(" ")
        names[folder] = synonyms.split(",")[0].strip()
        if not names[folder]:
            raise InputError(f"{path}: line {line!r} has no name, expected a folder, a blank and a class name")
    return names


def _samples(files: list[str], names: dict[str, str], template: str) -> Iterator[Sample]:
    for name in files:
        caption = template.replace("{}", names[name.split("/")[0]])
        yield Sample(str(PurePosixPath(name).with_suffix("")), name, [caption], [])
