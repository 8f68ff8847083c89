"""The record beside each image (`sample.schema.json`): parsed, checked, and stripped of what cannot be used."""

from __future__ import annotations

import json
import reprlib
from typing import NamedTuple

_MAX_SIDE = 2**31 - 1  # PNG's own limit; all that is reckoned with it stays a finite float
_brief = reprlib.Repr()
_brief.maxlist = _brief.maxdict = 4
_brief.maxlevel = 2


class Record(NamedTuple):
    """A checked record.

    Attributes:
        captions: at least one text.
        boxes: x0, y0, x1, y1 in pixels, inside the image and not empty; one for each phrase.
        phrases: the regions' texts.
        width, height: of the image in pixels.
        problems: (kind, detail) of each part that was left out.
    """

    captions: list[str]
    boxes: list[tuple[float, float, float, float]]
    phrases: list[str]
    width: int
    height: int
    problems: list[tuple[str, str]]


class RecordError(Exception):
    """A record that cannot be used at all; `kind` is the name under which it is counted."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def parse_record(data: bytes) -> Record:
    """Check a record's JSON.

    A region without text, or whose box is malformed, empty or wholly outside the image, is left out and listed in
    `problems`; a box that is partly outside is clipped.

    Raises:
        RecordError: not a JSON object, no usable caption, or no valid width and height.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("bad record", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError("bad record", f"a JSON {type(value).__name__}, expected an object")
    width, height = value.get("width"), value.get("height")
    if not (_is_side(width) and _is_side(height)):
        expected = f"expected integers from 1 to {_MAX_SIDE}"
        raise RecordError("bad record", f"width {short(width)} and height {short(height)}, {expected}")
    captions, regions = value.get("captions"), value.get("regions", [])
    if not isinstance(captions, list):
        raise RecordError("no caption", f"captions is {short(captions)}, expected a list of texts")
    captions = [text for text in captions if _is_text(text)]
    if not captions:
        raise RecordError("no caption", "captions holds no text")
    if not isinstance(regions, list):
        raise RecordError("bad record", f"regions is {short(regions)}, expected a list")
    boxes, phrases, problems = [], [], []
    for region in regions:
        box, text = (region.get("box"), region.get("text")) if isinstance(region, dict) else (None, None)
        clipped = _clip(box, width, height)
        if clipped is None:
            problems.append(("bad region box", f"box {short(box)} in an image of {width}×{height}"))
        elif not _is_text(text):
            problems.append(("region without text", f"text {short(text)}"))
        else:
            boxes.append(clipped)
            phrases.append(text)
    return Record(captions, boxes, phrases, width, height, problems)


def short(value: object) -> str:
    """A JSON value for a message: of bounded length, whatever its depth."""
    text = _brief.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIDE


def _is_text(value: object) -> bool:
    """True for a string that shows something and can be written as UTF-8 (a lone half of a surrogate pair cannot)."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _clip(box: object, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The part of a box that lies in the image, None if there is none or it is no box."""
    if not isinstance(box, list) or len(box) != 4 or not {type(value) for value in box} <= {int, float}:
        return None
    if any(value != value for value in box):  # NaN, which max and min below would not stop
        return None
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    return (float(x0), float(y0), float(x1), float(y1)) if x0 < x1 and y0 < y1 else None
