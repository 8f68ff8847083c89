"""What is wrong with one sample: its record against the schema, its image decoded in full, its boxes and texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cllip_fast.data.crop import Window
from cllip_fast.data.decode import Decoder, ImageError
from cllip_fast.data.record import Record, RecordError, short
from cllip_fast.data.samples import Sample
from cllip_fast.data.shards import ShardError, ShardReader
from cllip_fast.shard_tools.samples import read_record
from cllip_fast.shard_tools.schema import record_schema, violations

# Departures from the schema that have kinds of their own.
_HAS_KIND = re.compile(r"captions.*|regions\[\d+\](\.(box|text).*)?")


class Verdict(NamedTuple):
    """Whether training can use a sample, and (kind, detail) of each thing that is wrong with it."""

    usable: bool
    problems: list[tuple[str, str]]


def examine(sample: Sample, reader: ShardReader, max_pixels: int) -> Verdict:
    """Judge a sample as training does, in the same order, but decode the whole image; `reader` is of its shard."""
    try:
        record, value = read_record(reader, sample)
    except RecordError as error:
        return Verdict(False, [(error.kind, str(error))])
    problem = _image_problem(sample, reader, record, max_pixels)
    if problem is not None:
        return Verdict(False, [problem])
    return Verdict(True, [*record.problems, *_text_problems(record, value), *_notes(record, value)])


def _image_problem(sample: Sample, reader: ShardReader, record: Record, max_pixels: int) -> tuple[str, str] | None:
    _, offset, size, _ = sample.image
    width, height = record.width, record.height
    if width * height > max_pixels:
        return "too many pixels", f"{width}×{height}, expected at most {max_pixels} pixels"
    whole, pixels = (0, 0, width, height), np.empty((height, width, 3), dtype=np.uint8)
    try:
        data = reader.read(0, offset, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is whether it decodes
            Decoder(max_pixels=max_pixels).fill(data, (width, height), Window(whole, whole), pixels[0, 0], pixels)
    except ShardError as error:
        return "unreadable shard", str(error)
    except ImageError as error:
        return error.kind, str(error)
    return None


def _text_problems(record: Record, value: dict[str, Any]) -> list[tuple[str, str]]:
    """One for each caption that `parse_record` left out."""
    count = len(value["captions"])
    return [("caption without text", f"one of {count} captions")] * (count - len(record.captions))


def _notes(record: Record, value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What training uses all the same."""
    for region in value.get("regions", []):
        box = region.get("box") if isinstance(region, dict) else None
        if _partly_outside(box, record.width, record.height):
            yield "box partly outside", f"box {short(box)} in an image of {record.width}×{record.height}"
    for place, problem in violations(value, record_schema()):
        if not _HAS_KIND.fullmatch(place):
            yield "differs from schema", f"{place}: {problem}"


def _partly_outside(box: object, width: int, height: int) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not {type(value) for value in box} <= {int, float}:
        return False
    x0, y0, x1, y1 = box
    touches = max(x0, 0) < min(x1, width) and max(y0, 0) < min(y1, height)
    return touches and (x0 < 0 or y0 < 0 or x1 > width or y1 > height)
