from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cllip_fast.data.batch import Batch
from cllip_fast.errors import InputError
from cllip_fast.models import create_model
from cllip_fast.show import picture_sheet, sheet
from cllip_fast.show.canvas import INK, PALETTE, cut, outline, text_width, wrap
from cllip_fast.show.heat import colour_map, heat_panel

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
BOX = [0.25, 0.5, 0.75, 1.0]
PREDICTED = [0.0, 0.125, 0.5, 0.4]
TOP = sheet.HEADER_HEIGHT + 2 * sheet.LINE + 6  # of the first image
ROW = 256 + 2 * sheet.LINE + 2 * sheet.GAP


def by_letters(texts: list[str], length: int) -> torch.Tensor:
    """A stand-in for a tokenizer: the last letters."""
    return torch.tensor([[ord(letter) for letter in text[-length:]] for text in texts])


def write_sheet(path: Path, *, count: int = 12, grounds: bool = True, phrases: int = 1) -> np.ndarray:
    """The sheet of two grey images, the second without regions, as an array."""
    model = create_model("tiny", vocab_size=300, text_length=8, region="prompter" if grounds else "roi_align").eval()
    if grounds:
        model.ground = lambda tokens, texts: torch.tensor(PREDICTED).expand(1, texts.shape[1], 4)
    side = model.config.image_size
    grey = (0.5 - torch.tensor(MEAN)) / torch.tensor(STD)
    boxes, mask = torch.zeros(2, max(phrases, 1), 4), torch.zeros(2, max(phrases, 1), dtype=torch.bool)
    boxes[0, :phrases] = torch.tensor(BOX)
    mask[0, :phrases] = True
    batch = Batch(
        images=grey[None, :, None, None].expand(2, 3, side, side),
        text=torch.ones(2, 8, dtype=torch.int64),
        boxes=boxes,
        region_text=torch.zeros(2, max(phrases, 1), 4, dtype=torch.int64),
        region_mask=mask,
        keys=["a", "b"],
        captions=[["a caption that goes on and on " * 9], ["short"]],
        phrases=[[f"a phrase with a long, long, long name {k}" for k in range(phrases)], []],
    )
    written = picture_sheet(
        model, batch, tokenizer=by_letters, region_length=4, mean=MEAN, std=STD, path=path, count=count
    )
    assert written == path
    return np.asarray(Image.open(path)).astype(int)


def border(box: list[float]) -> tuple[slice, int]:
    """Columns and row, on the sheet, of a box's upper edge in the first image; its corners are left out."""
    x0, y0, x1, _ = (round(value * 255) for value in box)
    return slice(sheet.GAP + x0 + 4, sheet.GAP + x1 - 4), TOP + y0


def test_boxes_are_where_they_should_be(tmp_path: Path) -> None:
    picture = write_sheet(tmp_path / "deep" / "sheet.png")
    columns, row = border(BOX)
    assert (picture[row, columns] == PALETTE[0]).all()  # ground truth: solid
    assert (picture[row - 1, columns] == INK).all()
    columns, row = border(PREDICTED)
    coloured = (picture[row, columns] == PALETTE[0]).all(1)
    assert 0.3 < coloured.mean() < 0.8  # predicted: dashed
    inside = picture[TOP + 200, sheet.GAP + 100 : sheet.GAP + 150]
    assert np.abs(inside - 128).max() <= 1  # the normalisation is undone


def test_a_model_that_cannot_ground_has_no_predicted_boxes(tmp_path: Path) -> None:
    picture = write_sheet(tmp_path / "sheet.png", grounds=False)
    columns, row = border(BOX)
    assert (picture[row, columns] == PALETTE[0]).all()
    columns, row = border(PREDICTED)
    assert not (picture[row, columns] == PALETTE[0]).all(1).any()


def test_sheet_has_a_row_for_each_image(tmp_path: Path) -> None:
    width = 256 * 5 + 2 * sheet.GAP + sheet.LEGEND_WIDTH + 4 * sheet.GAP
    assert write_sheet(tmp_path / "a.png").shape == (sheet.HEADER_HEIGHT + 2 * ROW, width, 3)
    assert write_sheet(tmp_path / "b.png", count=1).shape == (sheet.HEADER_HEIGHT + ROW, width, 3)


def test_more_phrases_than_colours_or_lines(tmp_path: Path) -> None:
    many = write_sheet(tmp_path / "many.png", phrases=40)
    assert many.shape == write_sheet(tmp_path / "none.png", phrases=0).shape


def test_a_repeated_phrase_is_asked_once() -> None:
    model = create_model("tiny", vocab_size=300, text_length=8).eval()
    side = model.config.image_size
    boxes = torch.tensor([[BOX, PREDICTED, [0.0, 0.0, 0.5, 1.0], [0.0] * 4]])
    batch = Batch(
        images=torch.randn(1, 3, side, side), text=torch.ones(1, 8, dtype=torch.int64), boxes=boxes,
        region_text=torch.zeros(1, 4, 4, dtype=torch.int64), region_mask=torch.tensor([[True, True, True, False]]),
        keys=["a"], captions=[["cars"]], phrases=[["a car", "a tree", "a car"]],
    )  # fmt: skip
    model.ground = lambda tokens, texts: torch.tensor([[[0.0, 0.5, 0.5, 1.0], PREDICTED]])
    car, tree = sheet.ask(model, batch, 0, by_letters, 4)
    assert (car.phrase, tree.phrase) == ("a car", "a tree")
    assert car.boxes.tolist() == [BOX, [0.0, 0.0, 0.5, 1.0]]
    assert car.iou == pytest.approx(0.5)  # with the better of its two boxes
    assert tree.iou == pytest.approx(1.0)
    text = model.encode_text(by_letters(["a tree"], 4), normalize=True)
    patches = model.encode_patches(model.image_tokens(batch.images), normalize=True)
    torch.testing.assert_close(tree.similarity.flatten(), (patches[0] @ text[0]))


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="count is 0"):
        write_sheet(tmp_path / "sheet.png", count=0)
    assert not (tmp_path / "sheet.png").exists()


def test_heat_panel_is_brightest_at_its_peak() -> None:
    similarity = torch.zeros(4, 8)
    similarity[1, 6], similarity[3, 0] = 1.0, -1.0
    panel = np.asarray(heat_panel(Image.new("RGB", (256, 128), (100, 100, 100)), similarity, opacity=1.0))
    high, low = colour_map(np.array([1.0, 0.0]))
    assert (panel[34, 194] == high).all()  # a corner of the peak's cell, beside the mark
    assert (panel[126, 2] == low).all()
    assert (panel[48, 208] == 255).all()  # the mark, at the cell's centre


def test_the_mark_is_in_the_middle_of_a_flat_peak() -> None:
    """A map laid over an image is level from the outer patches' centres to the image's edge."""
    similarity = torch.zeros(64, 64)
    similarity[:24, 30] = 1.0
    panel = np.asarray(heat_panel(Image.new("RGB", (64, 64), (100, 100, 100)), similarity, opacity=1.0))
    white = np.argwhere((panel == 255).all(-1))
    assert np.abs(white.mean(0) - (12, 30.5)).max() <= 1, "not at the edge, where half of it would be missing"


@pytest.mark.parametrize("dashed", [False, True])
def test_what_a_tiny_box_holds_is_seen(dashed: bool) -> None:
    picture = Image.new("RGB", (60, 60), (9, 200, 9))
    outline(ImageDraw.Draw(picture), (30, 30, 32, 31), PALETTE[0], dashed=dashed, width=3)
    pixels = np.asarray(picture)
    assert (pixels[30:32, 30:33] == (9, 200, 9)).all()
    assert (pixels == PALETTE[0]).all(-1).any()


def test_colour_map_gets_lighter_all_the_way() -> None:
    lightness = colour_map(np.linspace(0, 1, 50)) @ np.array([0.21, 0.72, 0.07])
    assert (np.diff(lightness) > 0).all()


def test_text_is_cut_and_wrapped_to_its_width() -> None:
    text = "one two three four five six seven eight nine ten"
    assert cut("short", 200, 15) == "short"
    assert cut(text, 120, 15).endswith("…")
    assert text_width(cut(text, 120, 15), 15) <= 120
    lines = wrap(text, 120, 15, lines=2)
    assert len(lines) == 2
    assert text.startswith(lines[0] + " " + lines[1].removesuffix("…"))
    assert all(text_width(line, 15) <= 120 for line in lines)
    assert wrap("short", 120, 15, lines=2) == ["short"]
