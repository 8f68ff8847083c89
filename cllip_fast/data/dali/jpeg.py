"""Which files DALI is given: plain JPEGs, by their markers. Everything else stays with the plain loader's decoder.

DALI gives up a whole batch over one bad file, and takes some that libjpeg, which Pillow uses, refuses: it stops once
its window is decoded, and libjpeg only at the end mark. So all markers are looked at before. A file that is turned away
here is not yet bad: Pillow has the last word, as in the plain loader, and the same samples are left out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_START, _END, _FILL = b"\xff\xd8", b"\xff\xd9", 0xFF
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # without Huffman tables, reserved, arithmetic coding
_BASELINE_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_TABLES_AND_NOTES = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # Huffman, quantization, restarts, APPn, comments
_SCAN, _ADOBE = 0xDA, 0xEE
_ADOBE_TRANSFORM = 11
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # not what a scan's data may hold: stuffing, restarts


def why_not(data: bytes, size: tuple[int, int]) -> str | None:
    """Why DALI must not see a file, None if it may.

    Args:
        data: the file.
        size: width and height that it must have.

    Returns:
        None for a JPEG of 8 bits, baseline or progressive, grey or YCbCr, of this size, whose markers are in order from
        the start to an end mark that ends the file.
    """
    if not data.startswith(_START):
        return "not a JPEG"
    if not data.endswith(_END):
        return "no end mark"
    frame = _find_frame(data)
    if frame is None:
        return "markers out of order"
    if frame.marker not in _BASELINE_OR_PROGRESSIVE or frame.body[0] != 8:
        return "arithmetic, lossless or 12-bit JPEG"
    if frame.body[5] not in (1, 3) or (frame.body[5] == 3 and (frame.is_rgb or frame.body[6:15:3] == b"RGB")):
        return "CMYK or RGB JPEG"
    height, width = int.from_bytes(frame.body[1:3], "big"), int.from_bytes(frame.body[3:5], "big")
    return None if (width, height) == size else "size differs from record"


class _Frame(NamedTuple):
    """Marker and body of the frame header, and whether Adobe's mark says that the colours are RGB."""

    marker: int
    body: bytes
    is_rgb: bool


def _find_frame(data: bytes) -> _Frame | None:
    """The one frame of a file whose markers are in order to its end; None for any other file."""
    frame, is_rgb, scans = None, False, 0
    position = len(_START)
    while position + 4 <= len(data) and data[position] == _FILL:
        marker = data[position + 1]
        if marker == _FILL:
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker in _FRAMES and frame is None and len(body) >= 9:
            frame = (marker, body)
        elif marker == _SCAN and frame is not None:
            scans += 1
            found = _MARKER.search(data, position)
            if found is None:
                return None
            position = found.start()
        elif marker == _ADOBE and body.startswith(b"Adobe") and len(body) > _ADOBE_TRANSFORM:
            is_rgb = body[_ADOBE_TRANSFORM] == 0
        elif marker not in _TABLES_AND_NOTES:
            return None
    return _Frame(*frame, is_rgb) if scans and data[position:] == _END else None
