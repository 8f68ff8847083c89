"""Visual Genome: some fifty described regions an image.

Layout (homes.cs.washington.edu/~ranjay/visualgenome/api.html, versions 1.0 to 1.4): `region_descriptions.json`, a list
of {id, regions: [{x, y, width, height in pixels, phrase, ...}]}; the images <id>.jpg in `VG_100K` and `VG_100K_2`, or
in one folder. There are no captions: the first phrases become one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllip_fast.convert.coco import corners
from cllip_fast.convert.files import check_entries, check_folder, read_json
from cllip_fast.convert.sample import Region, Sample, Source, listed

_FOLDERS = ("VG_100K", "VG_100K_2")
_REGION = {"x": float, "y": float, "width": float, "height": float, "phrase": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", type=Path, required=True, metavar="JSON", help="region_descriptions.json")
    help = "folder of the image files, or of VG_100K and VG_100K_2"
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help=help)


def read(regions: Path, images: Path) -> Source:
    """Read Visual Genome's regions; `InputError` if the file is missing or malformed."""
    check_folder("images", images)
    entries = check_entries(f"{regions}: entry", read_json(regions), {"id": int, "regions": list})
    return Source("visual-genome", _samples(regions, entries, images), images, total=len(entries))


def _samples(path: Path, entries: list[dict[str, Any]], images: Path) -> Iterator[Sample]:
    for number, entry in enumerate(entries):
        found = check_entries(f"{path}: entry[{number}].regions", entry["regions"], _REGION)
        regions = [Region(corners([r["x"], r["y"], r["width"], r["height"]]), r["phrase"]) for r in found]
        name = f"{entry['id']}.jpg"
        name = next((f"{folder}/{name}" for folder in _FOLDERS if (images / folder / name).is_file()), name)
        yield Sample(str(entry["id"]), name, [listed(region.text for region in regions)], regions)
