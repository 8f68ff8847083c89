"""Text in any script is written with a font that has it, or spelled: never as rectangles that all look alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image, ImageDraw

from cllip_fast.show import fonts
from cllip_fast.show.canvas import INK, PAPER, cut, text_width, write


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without fonts and without matplotlib."""
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no such font.ttf",))
    monkeypatch.setattr(fonts, "_of_matplotlib", list)
    fonts._fonts.cache_clear()
    yield
    fonts._fonts.cache_clear()


def drawn(text: str) -> bytes:
    picture = Image.new("RGB", (200, 30), PAPER)
    write(ImageDraw.Draw(picture), (2, 2), text, 15, INK)
    return picture.tobytes()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a plain dog…", "a plain dog…"),
        ("a 狗 left", "a \\u72d7 left"),
        ("🐕", "\\U0001f415"),
        ("naïve", "na\\xefve"),
        ("कु", "\\u0915\\u0941"),  # a letter and its mark
    ],
)
def test_what_no_font_has_is_spelled(text: str, spelled: str) -> None:
    assert fonts.fit(text, 15)[1] == spelled
    assert drawn(text) == drawn(spelled)
    assert text_width(text, 15) == text_width(spelled, 15)


@pytest.mark.usefixtures("bare")
def test_spelled_text_is_cut_to_its_width() -> None:
    kept = cut("狗" * 5000, 120, 15)
    assert kept == "狗" * (len(kept) - 1) + "…"
    assert text_width(kept, 15) <= 120 < text_width("狗" + kept, 15)


def test_a_font_that_has_more_is_taken() -> None:
    pytest.importorskip("matplotlib")
    for text in ("красная кружка", "πορτοκαλί", "naïve café"):
        assert fonts.fit(text, 15)[1] == text
    assert drawn("кружка") != drawn("собака")
    own = fonts._fonts(15)[0]
    assert fonts.fit("a red mug", 15) == (own, "a red mug"), "Pillow's own where that suffices"
