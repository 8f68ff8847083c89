"""The Prompter's attention, as it is shown, against its layer written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cllip_fast.models import CllipModel, create_model
from cllip_fast.report.attention import Look, covered_share, look_at_boxes, look_for_texts

SIZES = {"embed_dim": 16, "vision_width": 32, "vision_depth": 1, "text_width": 32, "text_depth": 1}
BOXES = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def small(pool: str, class_token: bool) -> CllipModel:
    model = create_model(
        "tiny", image_size=32, vocab_size=64, text_length=8, prompter_pool=pool, class_token=class_token, **SIZES
    )
    model.prompter.qkv.weight.data *= 4  # shares that differ
    return model.double().eval()


def dense(model: CllipModel, tokens: Tensor, prompt: Tensor) -> Tensor:
    """Rows of the prompt's tokens [n, n+T] of the whole layer's attention over [prompt, image]."""
    prompter = model.prompter
    if prompter.positions is not None:
        tokens = tokens + prompter.positions
    x = torch.cat([prompt, tokens])
    q, k, _ = prompter.qkv(prompter.norm_1(x)).chunk(3, dim=-1)
    return (q @ k.T / math.sqrt(x.shape[1])).softmax(-1)[: len(prompt)]


@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kind", ["box", "text"])
@torch.no_grad()
def test_attention_is_the_layers(pool: str, class_token: bool, kind: str) -> None:
    model = small(pool, class_token)
    tokens, texts = torch.randn(2, 16 + class_token, 32).double(), torch.randn(3, 16).double()
    prompter = model.prompter
    asked = BOXES if kind == "box" else texts
    prompts = (prompter.box_prompts if kind == "box" else prompter.text_prompts)(asked.expand(2, -1, -1))
    length = 2 if kind == "box" else 1
    shares = prompter.attention(prompter.remember(tokens), prompts)
    assert shares.shape == (2, 3, length, length + 16 + class_token)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, length).double())
    assert shares.std() > 0.01
    for i in range(2):
        looks = (look_at_boxes if kind == "box" else look_for_texts)(model, tokens[i : i + 1], asked)
        for k, look in enumerate(looks):
            expected = dense(model, tokens[i], prompts[i, k])
            torch.testing.assert_close(shares[i, k], expected)
            mean = expected.mean(0).float()
            torch.testing.assert_close(look.patches, mean[-16:].view(4, 4))
            assert look.own == pytest.approx(float(mean[:length].sum()), abs=1e-6)


def test_the_share_inside_boxes() -> None:
    look = Look(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) / 20, own=0.5)
    upper, lower = [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]
    for boxes, share in (
        ([[0.0, 0.0, 1.0, 1.0]], 1.0),
        ([upper], 0.2),
        ([lower], 0.7),
        ([upper, lower, upper], 0.9),
        ([[0.25, 0.25, 0.5, 0.5]], 0.025),  # a quarter of the first patch, whose centre is on its edge
        ([[0.0, 0.75, 0.125, 1.0]], 0.3 / 8),  # holds no patch's centre
    ):
        assert look.inside(torch.tensor(boxes)) == pytest.approx(share)


def test_even_attention_gives_the_boxes_share_of_the_image() -> None:
    boxes = torch.tensor([[0.1, 0.2, 0.45, 0.9], [0.3, 0.6, 0.98, 0.75]])
    expected = 0.35 * 0.7 + 0.68 * 0.15 - 0.15 * 0.15
    assert covered_share(boxes) == pytest.approx(expected, abs=0.01)
    assert Look(torch.full((8, 8), 0.7 / 64), own=0.3).inside(boxes) == pytest.approx(expected, abs=0.02)
