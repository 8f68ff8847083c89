"""Which files DALI is given: plain JPEGs, by their headers. Everything else stays with the plain loader's decoder.

DALI gives up a whole batch over one bad file, so what can be told from the header is told before. A file that is
turned away here is not yet bad: Pillow has the last word, as in the plain loader, and the same samples are left out.
"""

from __future__ import annotations

_START, _END, _FILL = b"\xff\xd8", b"\xff\xd9", 0xFF
_BASELINE_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # in the range of the frame headers: Huffman tables, reserved, arithmetic coding
_WITHOUT_BODY = (0x01, *range(0xD0, 0xD8))
_STOP = (0xD8, 0xD9, 0xDA)  # a second start, the end, the first scan
_ADOBE, _ADOBE_TRANSFORM = 0xEE, 11


def why_not(data: bytes, size: tuple[int, int]) -> str | None:
    """Why DALI must not see a file, None if it may.

    Args:
        data: the file.
        size: width and height that it must have.

    Returns:
        None for a JPEG of 8 bits, baseline or progressive, grey or YCbCr, of this size, with its end mark.
    """
    if not data.startswith(_START):
        return "not a JPEG"
    if not data.endswith(_END):
        return "no end mark"
    frame = _find_frame(data)
    if frame is None:
        return "no JPEG header"
    marker, body, is_rgb = frame
    if marker not in _BASELINE_OR_PROGRESSIVE or body[0] != 8:
        return "arithmetic, lossless or 12-bit JPEG"
    if body[5] not in (1, 3) or (body[5] == 3 and (is_rgb or body[6:15:3] == b"RGB")):
        return "CMYK or RGB JPEG"
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return None if (width, height) == size else "size differs from record"


def _find_frame(data: bytes) -> tuple[int, bytes, bool] | None:
    """Marker and body of the frame header, and whether Adobe's mark before it says RGB; None if there is none."""
    position, is_rgb = len(_START), False
    while position + 4 <= len(data) and data[position] == _FILL:
        marker = data[position + 1]
        if marker == _FILL:
            position += 1
        elif marker in _WITHOUT_BODY:
            position += 2
        elif marker in _STOP:
            return None
        else:
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            body = data[position + 4 : position + 2 + length]
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
                return (marker, body, is_rgb) if len(body) >= 9 else None
            if marker == _ADOBE and body.startswith(b"Adobe") and len(body) > _ADOBE_TRANSFORM:
                is_rgb = body[_ADOBE_TRANSFORM] == 0
            position += 2 + length
    return None
