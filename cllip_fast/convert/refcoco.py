"""RefCOCO, RefCOCO+, RefCOCOg and RefCOCO-S: phrases that refer to one object of a COCO image.

Layout of the first three (github.com/lichengunc/refer): `refs(unc).p`, a pickled list of references
{ref_id, ann_id, image_id, split, sentences: [{sent, ...}]}, or the same as JSON, and an `instances.json` in COCO's form
whose annotations `ann_id` names. RefCOCO-S (github.com/kuoyang1999/refcocos-annotator) is a JSON list of
{file_name, normal_caption, solution: [x0, y0, x1, y1] in pixels, or null}. Captions are COCO's, or the phrases.

A pickle can run code. This one is read by an unpickler that admits only lists, dicts, texts and numbers.
"""

from __future__ import annotations

import argparse
import pickle
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllip_fast.convert.coco import corners, image_facts, licence_names, read_captions, read_instances
from cllip_fast.convert.files import check_entries, check_folder, check_numbers, read_json
from cllip_fast.convert.sample import Region, Sample, Source, listed
from cllip_fast.errors import InputError

_REF = {"ann_id": int, "image_id": int, "split": str, "sentences": list}
_RECORD = {"file_name": str, "normal_caption": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refs", type=Path, required=True, metavar="FILE", help="refs(...).p, or JSON")
    parser.add_argument("--instances", type=Path, metavar="JSON", help="instances.json; RefCOCO-S needs none")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of COCO's images")
    parser.add_argument("--captions", type=Path, metavar="JSON", help="COCO's captions file (default: phrases instead)")
    parser.add_argument("--split", help="only this one: train, val, testA, ... (default: all)")


def read(
    refs: Path, images: Path, instances: Path | None = None, captions: Path | None = None, split: str | None = None
) -> Source:
    """Read references; `InputError` if a file is missing or malformed, or `instances` or `split` do not fit it."""
    check_folder("images", images)
    value = _read_pickle(refs) if refs.suffix == ".p" else read_json(refs)
    texts = None if captions is None else read_captions(captions)
    skipped: Counter[str] = Counter()
    own_boxes = isinstance(value, list) and value != [] and isinstance(value[0], dict) and "solution" in value[0]
    if own_boxes:
        if split is not None or instances is not None:
            raise InputError(f"{refs} has boxes of its own and no splits, expected neither --instances nor --split")
        samples = _samples_of_records(refs, check_entries(f"{refs}: entry", value, _RECORD), skipped)
    else:
        if instances is None:
            raise InputError(f"{refs} refers to annotations: name its instances.json with --instances")
        samples = _samples_of_refs(
            refs, check_entries(f"{refs}: entry", value, _REF), instances, images, split, skipped
        )
    return Source("refcoco", _with_captions(samples, texts), images, skipped=skipped)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, texts and numbers: whatever else a pickle holds, it must first find by name, here."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which annotations do not need")


def _read_pickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin-1").load()  # Python 2 wrote it
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged pickles fail in every way there is
        raise InputError(f"{path} is no plain pickle: {error}") from error


def _samples_of_refs(
    path: Path,
    refs: list[dict[str, Any]],
    instances: Path,
    folder: Path,
    split: str | None,
    skipped: Counter[str],
) -> Iterator[tuple[int, Sample]]:
    known = read_instances(instances, folder)
    annotations = check_entries(f"{instances}: annotations", known["annotations"], {"id": int})
    boxes = {entry["id"]: entry for entry in annotations}
    images = {image["id"]: image for image in known["images"]}
    licences = licence_names(instances, known)
    regions = defaultdict(list)
    splits = {ref["split"] for ref in refs}
    if split is not None and split not in splits:
        raise InputError(f"split is {split!r}, expected one of {', '.join(sorted(splits))}")
    for number, ref in enumerate(refs):
        place = f"{path}: entry[{number}]"
        sentences = check_entries(f"{place}.sentences", ref["sentences"], {"sent": str})
        if split not in (None, ref["split"]):
            skipped["phrases of other splits"] += len(sentences)
        elif ref["ann_id"] not in boxes or ref["image_id"] not in images:
            raise InputError(f"{place} refers to annotation {reprlib.repr(ref['ann_id'])}, which {instances} lacks")
        else:
            box = corners(boxes[ref["ann_id"]]["bbox"])
            regions[ref["image_id"]] += [Region(box, sentence["sent"]) for sentence in sentences]
    for number, found in sorted(regions.items()):
        image = images[number]
        yield number, Sample(f"{number:012d}", image["file_name"], [], found, **image_facts(image, licences))


def _samples_of_records(
    path: Path, records: list[dict[str, Any]], skipped: Counter[str]
) -> Iterator[tuple[int, Sample]]:
    regions = defaultdict(list)
    for number, record in enumerate(records):
        if record.get("solution") is None:
            skipped["phrases that refer to nothing"] += 1
            continue
        box = check_numbers(f"{path}: entry[{number}].solution", record["solution"], 4)
        regions[record["file_name"]].append(Region(tuple(box), record["normal_caption"]))
    for name, found in sorted(regions.items()):
        match = re.search(r"(\d{1,18})\.\w+$", name)
        if match is None:
            raise InputError(f"{path}: file_name is {reprlib.repr(name)}, expected one that ends in the image's number")
        number = int(match[1])
        yield number, Sample(f"{number:012d}", name, [], found)


def _with_captions(samples: Iterator[tuple[int, Sample]], captions: dict[int, list[str]] | None) -> Iterator[Sample]:
    for number, sample in samples:
        texts = [listed(region.text for region in sample.regions)] if captions is None else captions.get(number, [])
        sample.captions.extend(texts)
        yield sample
