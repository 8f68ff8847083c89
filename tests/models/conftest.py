"""Small models and inputs in fp64, shared by the model tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cllip_fast.models import CllipModel, create_model

MINI = {
    "image_size": 24,
    "vocab_size": 30,
    "text_length": 12,
    "embed_dim": 12,
    "vision_width": 16,
    "vision_depth": 2,
    "vision_heads": 2,
    "text_width": 8,
    "text_heads": 2,
}


@dataclass
class Inputs:
    """A batch of 3 images of 24 px, 5 regions each, the last region of the first image padded."""

    images: Tensor
    text: Tensor
    boxes: Tensor
    region_text: Tensor
    region_mask: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        return self.images, self.text, self.boxes, self.region_text, self.region_mask


def random_texts(*shape: int) -> Tensor:
    """Token ids 1..29 of random lengths from 1 on, padded with 0."""
    tokens = torch.randint(1, 30, shape)
    lengths = torch.randint(1, shape[-1] + 1, shape[:-1])
    return tokens * (torch.arange(shape[-1]) < lengths[..., None])


@pytest.fixture
def mini() -> Callable[..., CllipModel]:
    """Builds a small fp64 model of the tiny preset's kind; norms and biases are random, so that each one matters."""

    def build(**options: object) -> CllipModel:
        torch.manual_seed(0)
        model = create_model("tiny", **(MINI | options)).double()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def inputs() -> Inputs:
    torch.manual_seed(1)
    low = torch.rand(3, 5, 2, dtype=torch.float64) * 0.5
    boxes = torch.cat([low, low + 0.1 + 0.4 * torch.rand(3, 5, 2, dtype=torch.float64)], dim=-1)
    region_text = random_texts(3, 5, 4)
    region_mask = torch.ones(3, 5, dtype=torch.bool)
    boxes[0, 4], region_text[0, 4], region_mask[0, 4] = 0, 0, False
    return Inputs(torch.randn(3, 3, 24, 24).double(), random_texts(3, 9), boxes, region_text, region_mask)
