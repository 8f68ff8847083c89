"""What stands beside pictures: texts of the data that neither turn the page round nor fill it, and shares."""

from __future__ import annotations

import torch
from PIL import Image

from cllip_fast.report.attention import Look
from cllip_fast.report.failures import BoxFailure, ImageFailure, RegionFailure
from cllip_fast.report.html import Html
from cllip_fast.report.pictures import attention_row, box_card, image_card, picture_row, region_card
from cllip_fast.show.sheet import Answer

TURNED = "\u202eturned"  # what follows is written from right to left
LONG = "very " * 100 + "long"
PICTURE = Image.new("RGB", (64, 64))
BOX = torch.tensor([0.1, 0.2, 0.5, 0.6])


def all_of_them(text: str) -> list[Html]:
    answer = Answer(text, BOX[None], torch.rand(2, 2), BOX, 1.0)
    return [
        image_card(ImageFailure(0, 1.0, text, 0.5, 2, text, 0.6), PICTURE, "key"),
        region_card(RegionFailure(0, BOX, 1.0, text, 0.5, text, 0.6), PICTURE, "key"),
        box_card(BoxFailure(0, text, BOX[None], BOX, 1.0, 1.0), PICTURE, "key"),
        attention_row(PICTURE, answer, None, None),
        picture_row(PICTURE, text, [answer]),
    ]


def test_a_texts_direction_ends_with_it() -> None:
    for part in all_of_them(TURNED):
        outside = part.replace(f"<bdi>{TURNED}</bdi>", "").replace(f"“{TURNED}”", "")  # the latter in alt
        assert len(outside) < len(part)
        assert "\u202e" not in outside


def test_a_long_text_is_cut_and_whole_in_its_title() -> None:
    for part in all_of_them(LONG):
        assert f'<bdi title="{LONG}">very very' in part
        assert part.count("long</bdi>") == ("article" in part), "but for the caption above an image"


def test_a_phrase_is_sought_in_all_its_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    look = Look(torch.tensor([[0.2, 0.1], [0.1, 0.4]]), own=0.2)
    part = attention_row(PICTURE, Answer("dogs", boxes, torch.rand(2, 2), BOX, 1.0), look, look)
    for words in (
        "2 boxes cover 50 % of the image, the first 25 %",
        "box prompt</strong><span class='faint'> 25 % in the box; 20 % stays in the prompt",
        "phrase prompt</strong><span class='faint'> 75 % in the boxes; 20 % stays in the prompt",
    ):
        assert words.replace("'", '"') in part.replace("\N{NO-BREAK SPACE}", " ")
