"""Small drawing helpers on Pillow: text that is cut to fit, dashed boxes, colours."""

from __future__ import annotations

from bisect import bisect_right

from PIL import Image, ImageDraw

from cllip_fast.show.fonts import fit

Colour = tuple[int, int, int]

# Okabe and Ito's colours, told apart by colour-blind readers as well, in an order that keeps neighbours far apart.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (204, 121, 167),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
INK: Colour = (30, 30, 34)
FAINT: Colour = (110, 110, 118)
PAPER: Colour = (250, 250, 248)
DASH = 3  # of the line's width, dash and gap each
SEEN = 5  # pixels of the picture that the border of the smallest box leaves to be seen


def text_width(text: str, size: int) -> int:
    """Width in pixels of one line of text as `write` draws it."""
    font, text = fit(text, size)
    return round(font.getlength(text))


def cut(text: str, width: float, size: int) -> str:
    """`text` on one line, shortened with an ellipsis to at most `width` pixels at font size `size`."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda count: text_width(text[:count].rstrip() + "…", size))
    return text[: max(fits - 1, 0)].rstrip() + "…"


def wrap(text: str, width: float, size: int, lines: int) -> list[str]:
    """`text` broken between words into at most `lines` lines; what does not fit is cut from the last."""
    words, done = text.split(), []
    while words and len(done) < lines - 1:
        count = len(words)
        while count > 1 and text_width(" ".join(words[:count]), size) > width:
            count -= 1
        done.append(cut(" ".join(words[:count]), width, size))
        words = words[count:]
    return done + [cut(" ".join(words), width, size)] if words else done


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Colour = INK) -> None:
    """Write one line of text with its top left corner at `place`."""
    font, text = fit(text, size)
    draw.text(place, text, fill=colour, font=font)


def outline(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    colour: Colour,
    *,
    dashed: bool = False,
    width: int = 2,
) -> None:
    """Draw a box's border, solid or dashed, with a dark edge that keeps it visible on any background.

    Args:
        box: x0, y0, x1, y1 in pixels, x0 <= x1 and y0 <= y1; one too small to be seen into is drawn around what it
            holds.
    """
    least = 2 * width + SEEN
    (x0, x1), (y0, y1) = (_spread(*sides, least) for sides in (box[::2], box[1::2]))
    if not dashed:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=INK, width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        return
    inset, long = width - 1, DASH * width
    dashes = [
        dash
        for x in range(x0, x1 + 1, 2 * long)
        for dash in ((x, y0, min(x + long, x1), y0 + inset), (x, y1 - inset, min(x + long, x1), y1))
    ] + [
        dash
        for y in range(y0, y1 + 1, 2 * long)
        for dash in ((x0, y, x0 + inset, min(y + long, y1)), (x1 - inset, y, x1, min(y + long, y1)))
    ]
    for left, top, right, bottom in dashes:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=INK)
    for dash in dashes:
        draw.rectangle(dash, fill=colour)


def _spread(low: float, high: float, least: int) -> tuple[int, int]:
    """Both ends in whole pixels, moved apart alike until `least` pixels lie from one to the other."""
    more = max(0, least - (high - low)) / 2
    return round(low - more), round(high + more)


def swatch(draw: ImageDraw.ImageDraw, place: tuple[float, float], colour: Colour, side: int = 12) -> None:
    """A filled square that stands for a colour."""
    x, y = place
    draw.rectangle((x, y, x + side, y + side), fill=colour, outline=INK)


def paste(sheet: Image.Image, panel: Image.Image, place: tuple[int, int]) -> None:
    """Put a panel on the sheet, framed by a line."""
    sheet.paste(panel, place)
    x, y = place
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + panel.width, y + panel.height), outline=FAINT)
