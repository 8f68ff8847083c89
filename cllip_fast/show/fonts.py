"""A font for any text: Pillow's own, else one that the system has; what its font lacks is spelled out."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

# Names by which Pillow searches the system's folders: many alphabets first, then many ideographs.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Nirmala.ttf",
)
_NOBODYS = "\uffff"  # no character: what a font draws for it stands for all that it lacks


def fit(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """The first font that has most of a line of text, at `size` pixels, and the text as it can write it.

    A character that the font lacks, and would draw as an empty rectangle, is spelled as Python spells it: ``\\u72d7``.
    """
    fonts = _fonts(size)
    lacking = [{letter for letter in set(text) if not _has(font, letter)} for font in fonts]
    best = min(range(len(fonts)), key=lambda k: len(lacking[k]))
    spelled = (each.encode("unicode_escape").decode() if each in lacking[best] else each for each in text)
    return fonts[best], "".join(spelled)


@cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    found = [ImageFont.load_default(size)]
    for name in (*SYSTEM_FONTS, *_of_matplotlib()):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # this system does not have it
            continue
    return tuple(found)


def _of_matplotlib() -> list[str]:
    """The font that comes with matplotlib, where that is installed: containers often have no other."""
    spec = find_spec("matplotlib")
    return [str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")] if spec and spec.origin else []


@cache
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    alone = _unjoined(font)
    return bytes(alone.getmask(letter)) != bytes(alone.getmask(_NOBODYS))


@cache
def _unjoined(font: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    """The font without the rules of scripts, which would put a circle of dots beneath a mark that stands alone."""
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
