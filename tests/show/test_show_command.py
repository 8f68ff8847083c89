"""`cllip-fast show`: the map and the box of each phrase lie where the model put them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cllip_fast.errors import InputError
from cllip_fast.inference import TrainedModel
from cllip_fast.show import phrases
from cllip_fast.show.canvas import INK, PALETTE
from cllip_fast.show.heat import colour_map
from tests.saved_run import save_run

BOX = (75.0, 55.0, 225.0, 165.0)  # of the picture of 300×220 pixels
PANEL = (384, 282)
TITLE_HEIGHT = 3 * phrases.LINE + 4  # of phrases of one line


def show(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    phrases.add_commands(parser.add_subparsers())
    options = parser.parse_args(["show", *map(str, arguments)])
    options.run(options)


def test_the_picture_shows_maps_and_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = save_run(tmp_path), tmp_path / "deep" / "out.png"
    asked = []

    def planted_map(self: TrainedModel, image: Path, texts: list[str], *, size: tuple[int, int]) -> torch.Tensor:
        asked.extend(texts)
        maps = torch.zeros(len(texts), size[1], size[0])
        maps[:, :, : size[0] // 2] = 0.5  # the left half is similar,
        maps[:, :20] = torch.nan  # and the model does not see the upper edge
        return maps

    monkeypatch.setattr(TrainedModel, "similarity_map", planted_map)
    monkeypatch.setattr(TrainedModel, "ground", lambda self, image, texts: torch.tensor([BOX] * len(texts)))
    texts = [
        "red circle",
        "blue\nstar",
        "green ring",
        "a fourth phrase that goes on beyond what is read of one, and on",
    ]
    image = tmp_path / "data" / "wide.jpg"
    show(image, *texts, "--checkpoint", run, "--out", out, "--device", "cpu")
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "note: of 'a fourth phrase that goes on" in said.err
    assert "'green ring'" not in said.err
    assert asked == texts

    picture = np.asarray(Image.open(out)).astype(int)
    title_height = TITLE_HEIGHT + phrases.LINE  # the fourth phrase needs two lines
    width, height = PANEL[0] + phrases.GAP, PANEL[1] + title_height + phrases.GAP
    assert picture.shape == (2 * height + phrases.GAP, 3 * width + phrases.GAP, 3)
    colours = Image.open(image).convert("RGB").resize(PANEL, Image.Resampling.BICUBIC)
    photo = np.asarray(colours.convert("L"))
    top = phrases.GAP + title_height
    first = picture[top : top + PANEL[1], phrases.GAP : phrases.GAP + PANEL[0]]
    assert np.abs(first[:60] - np.asarray(colours)[:60]).max() <= 3, "the image comes first, in its colours,"
    assert (first == PALETTE[3]).all(-1).any(), "with the boxes"
    for k in range(4):
        left = phrases.GAP + (k + 1) % 3 * width
        top = phrases.GAP + (k + 1) // 3 * height + title_height
        panel = picture[top : top + PANEL[1], left : left + PANEL[0]]
        x0, y0, x1, y1 = (round(value * (PANEL[i % 2] - 1) / (300, 220)[i % 2]) for i, value in enumerate(BOX))
        assert (panel[y0, x0 + 3 : x1 - 3] == PALETTE[k]).all()
        assert (panel[y0 + 3 : y1 - 3, x1] == PALETTE[k]).all()
        assert (panel[y0 - 1, x0 + 3 : x1 - 3] == INK).all()
        for row, column, value in ((150, 30, 1.0), (150, 350, 0.0), (10, 30, 0.0)):
            expected = 0.38 * photo[row, column] + 0.62 * colour_map(np.array(value))
            assert np.abs(panel[row, column] - expected).max() <= 2
        title = picture[top - title_height : top - 4, left : left + PANEL[0]]
        assert (np.abs(title - PALETTE[k]).sum(-1) == 0).any(), "the swatch has the box's colour"
        assert (title.sum(-1) < 150).sum() > 50, "and there is text"
        for value in (0, 1):
            assert (title == colour_map(np.array(value))).all(-1).any(), "and the colours' scale"


@pytest.mark.parametrize("how", [{"region": "roi_align", "crop": "center"}, {"losses": "clip,region"}])
def test_a_model_that_cannot_ground_shows_maps_alone(tmp_path: Path, how: dict[str, str]) -> None:
    run = save_run(tmp_path, **how)
    show(tmp_path / "data" / "tall.jpg", "red circle", "--checkpoint", run, "--out", tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    panel = picture[phrases.GAP + TITLE_HEIGHT : -phrases.GAP]
    assert not (panel == PALETTE[0]).all(-1).any()


def test_sixteen_bits_and_turned_photos_look_as_people_see_them(tmp_path: Path) -> None:
    run = save_run(tmp_path)
    Image.fromarray(np.full((40, 40), 128 * 257, np.uint16)).save(tmp_path / "grey.png")
    stored, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored.save(tmp_path / "turned.png", exif=exif)
    for name, size, colour in (("grey", (384, 384), (128,) * 3), ("turned", (192, 384), (255, 0, 0))):
        show(tmp_path / f"{name}.png", "red", "--checkpoint", run, "--out", tmp_path / "out.png")
        picture = np.asarray(Image.open(tmp_path / "out.png"))
        top = phrases.GAP + TITLE_HEIGHT
        assert picture.shape[0] == top + size[1] + phrases.GAP
        panel = picture[top : top + size[1], phrases.GAP : phrases.GAP + size[0]]
        assert (panel == colour).all(-1).mean() > 0.8


def test_long_phrases_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, image, written = save_run(tmp_path), tmp_path / "data" / "tall.jpg", []
    monkeypatch.setattr(phrases, "write", lambda draw, place, text, *style: written.append((text, place)))
    asked = [f"the dog that lies on the left side of the brown sofa behind the {what}" for what in ("table", "chair")]
    show(image, *asked, "--checkpoint", run, "--out", tmp_path / "a.png")
    for k, phrase in enumerate(asked, 1):
        left = phrases.GAP + k * (314 + phrases.GAP) + 20  # the image has 90×110 pixels, a panel 314×384
        lines = [(text, place[1]) for text, place in written if place[0] == left]
        assert " ".join(text for text, _ in lines) == phrase
        assert [y for _, y in lines] == [phrases.GAP + line * phrases.LINE for line in range(len(lines))]


def test_a_phrase_in_letters_that_no_font_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, nobodys = save_run(tmp_path), "red \U0010fffd"  # for private use
    show(tmp_path / "data" / "tall.jpg", nobodys, "red", "--checkpoint", run, "--out", tmp_path / "a.png")
    notes = [line for line in capsys.readouterr().err.splitlines() if "no font" in line]
    assert notes == [f"note: no font of this system has all of {nobodys!r}: the picture spells the rest"]


def test_without_out_the_picture_is_named_after_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    show(tmp_path / "data" / "wide.jpg", "red", "--checkpoint", run)
    assert capsys.readouterr().out == "wide_found.png\n"
    assert Image.open(tmp_path / "wide_found.png").size == (2 * PANEL[0] + 3 * phrases.GAP, 374)


def test_bad_files_are_named(tmp_path: Path) -> None:
    run, image = save_run(tmp_path), tmp_path / "data" / "wide.jpg"
    with pytest.raises(InputError, match=r"nowhere\.jpg' cannot be read"):
        show(tmp_path / "nowhere.jpg", "red", "--checkpoint", run, "--out", tmp_path / "out.png")
    for name in ("out.abc", "out", "data"):
        with pytest.raises(InputError, match=f"out is '.*{name}', expected the name of a picture, such as found.png"):
            show(image, "red", "--checkpoint", run, "--out", tmp_path / name)
    with pytest.raises(InputError, match=r"out\.png cannot be written: File exists$"):
        show(image, "red", "--checkpoint", run, "--out", image / "out.png")


def test_the_image_is_not_overwritten(tmp_path: Path) -> None:
    run, image = save_run(tmp_path), tmp_path / "data" / "wide.jpg"
    before = image.read_bytes()
    with pytest.raises(InputError, match=r"wide\.jpg', expected another file than the image itself"):
        show(image, "red", "--checkpoint", run, "--out", tmp_path / "data" / ".." / "data" / "wide.jpg")
    assert image.read_bytes() == before
