"""Prompts are asked in tiles, and only those that are real."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cllip_fast.evaluate.features import TILE, prompted
from cllip_fast.models import create_model
from tests.saved_run import small_model


@pytest.mark.parametrize(
    ("verb", "region"), [("encode_regions", "prompter"), ("encode_regions", "roi_align"), ("ground", "prompter")]
)
def test_tiles_give_what_all_at_once_gives(verb: str, region: str) -> None:
    model = small_model(64, region)
    encode = getattr(model, verb)
    counts = torch.tensor([0, 1, 33, 8, 9, 0, 2] + [3] * 30)
    mask = torch.arange(33) < counts[:, None]
    mask[3] = mask[3].flip(0)  # real ones need not come first
    tokens = torch.randn(len(counts), 16, 32)
    corners = torch.rand(len(counts), 33, 2) * 0.5
    prompts = torch.cat([corners, corners + 0.3], 2) if verb == "encode_regions" else torch.randn(len(counts), 33, 16)
    with torch.no_grad():
        assert_close(prompted(encode, tokens, prompts, mask), encode(tokens, prompts)[mask])
        assert prompted(encode, tokens, prompts, mask & False).numel() == 0


def test_the_fullest_image_does_not_set_the_cost_of_all() -> None:
    """One image of 300 regions among 64 with 2: 19,200 prompts in all if each image were padded to the fullest."""
    counts = torch.tensor([300] + [2] * 63)
    mask = torch.arange(300) < counts[:, None]
    calls = []

    def encode(tokens: Tensor, prompts: Tensor) -> Tensor:
        calls.append(prompts.shape[:2])
        return prompts

    prompted(encode, torch.zeros(64, 1, 1), torch.zeros(64, 300, 4), mask)
    assert max(images * prompts for images, prompts in calls) <= TILE[0] * TILE[1]
    assert sum(images * prompts for images, prompts in calls) < 2 * int(counts.sum())


def test_the_papers_prompter_stays_small() -> None:
    """With pool="all" a prompt is a sequence of its own."""
    model = create_model("tiny", vocab_size=64, text_length=8, prompter_pool="all").eval()
    tokens = torch.randn(1, model.config.patch_grid[0] * model.config.patch_grid[1], model.config.vision_width)
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.7]).expand(1, 500, 4)
    largest = 0

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    model.prompter.norm_2.register_forward_hook(look)
    with torch.no_grad():
        prompted(model.encode_regions, tokens, boxes, torch.ones(1, 500, dtype=torch.bool))
    assert 0 < largest <= TILE[1] * (tokens.shape[1] + 2) * tokens.shape[2]
