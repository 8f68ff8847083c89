"""Flickr30k Entities: five captions an image, whose noun phrases have boxes.

Layout (github.com/BryanPlummer/flickr30k_entities): `Sentences/<id>.txt` with lines such as
"[/EN#283585/people A young white male] wearing ..."; `Annotations/<id>.xml` in Pascal VOC's form, where a `name` is an
entity's number and an object may have several; `train.txt`, `val.txt` and `test.txt` with an id a line; the images
`<id>.jpg`. An entity with several boxes gives its phrase to each of them. Scenes and others without a box are skipped.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from cllip_fast.convert.files import check_folder, read_lines, read_xml
from cllip_fast.convert.sample import Region, Sample, Source
from cllip_fast.convert.voc import image_size, list_files, pixel_box
from cllip_fast.errors import InputError

# An entity may have several types: [/EN#6729/vehicles/scene the subway].
_PHRASE = re.compile(r"\[/EN#(?P<id>\d+)(?:/[^\s/\]]+)+\s+(?P<text>[^\[\]]*)\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sentences", type=Path, required=True, metavar="DIR", help="folder of the .txt files")
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of the .xml files")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
    parser.add_argument("--ids", type=Path, metavar="TXT", help="only images in this list, as train.txt (default: all)")


def read(sentences: Path, annotations: Path, images: Path, ids: Path | None = None) -> Source:
    """Read Flickr30k Entities; `InputError` if a file is missing or malformed."""
    check_folder("images", images)
    check_folder("annotations", annotations)
    files = list_files(sentences, "sentences", ".txt", ids)
    skipped: Counter[str] = Counter()
    return Source("flickr30k", _samples(files, annotations, skipped), images, total=len(files), skipped=skipped)


def _samples(files: list[Path], annotations: Path, skipped: Counter[str]) -> Iterator[Sample]:
    for path in files:
        boxes, size = _read_boxes(annotations / f"{path.stem}.xml")
        captions, regions = [], []
        for number, line in enumerate(read_lines(path)):
            captions.append(_PHRASE.sub(lambda match: match["text"], line))
            if "[/EN#" in captions[-1]:
                raise InputError(f"{path}: sentence {number + 1} has markup that does not end: {line[:80]!r}")
            for match in _PHRASE.finditer(line):
                if match["id"] not in boxes:
                    skipped["phrases without a box"] += 1
                regions += [Region(box, match["text"]) for box in boxes.get(match["id"], [])]
        yield Sample(path.stem, f"{path.stem}.jpg", captions, regions, size)


def _read_boxes(
    path: Path,
) -> tuple[dict[str, list[tuple[float, float, float, float]]], tuple[int, int] | None]:
    """Boxes by the entity's number, and the image's width and height."""
    root = read_xml(path)
    boxes = defaultdict(list)
    for number, entry in enumerate(root.findall("object")):
        bndbox = entry.find("bndbox")
        if bndbox is not None:
            box = pixel_box(f"{path}: object[{number}]", bndbox)
            for name in entry.findall("name"):
                boxes[(name.text or "").strip()].append(box)
    return boxes, image_size(root)
