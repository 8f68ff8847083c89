"""The pre-norm transformer block of all towers, and its initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllip_fast.models import checkpointing
from cllip_fast.models.attention import Packing, SelfAttention
from cllip_fast.models.norm import layer_norm


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), OpenAI's approximation of GELU: weights trained with it need it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Sequential):
    """Linear, GELU, linear: [..., W] -> [..., W]."""

    def __init__(self, width: int, ratio: float, *, quick_gelu: bool = False) -> None:
        hidden = int(width * ratio)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        super().__init__(nn.Linear(width, hidden), gelu, nn.Linear(hidden, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, L, W] -> [B, L, W].

    `grad_checkpointing` is one of `checkpointing.MODES`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        backend: str,
        causal: bool = False,
        quick_gelu: bool = False,
        norm: str = "torch",
    ) -> None:
        super().__init__()
        self.grad_checkpointing = "none"
        self.norm_1 = layer_norm(norm)(width)
        self.attention = SelfAttention(width, heads, backend=backend, causal=causal)
        self.norm_2 = layer_norm(norm)(width)
        self.mlp = Mlp(width, mlp_ratio, quick_gelu=quick_gelu)

    def forward(self, x: Tensor, mask: Tensor | Packing | None = None) -> Tensor:
        return checkpointing.run(self.grad_checkpointing, self._layer, x, mask)

    def _layer(self, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
        x = x + self.attention(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))


def init_layer(qkv: nn.Linear, out: nn.Linear, mlp: Mlp, depth: int) -> None:
    """CLIP's initialisation of one layer of a tower of `depth` layers: what enters the residual shrinks with depth."""
    width = qkv.in_features
    residual_std = width**-0.5 * (2 * depth) ** -0.5
    nn.init.normal_(qkv.weight, std=width**-0.5)
    nn.init.normal_(out.weight, std=residual_std)
    nn.init.normal_(mlp[0].weight, std=(2 * width) ** -0.5)
    nn.init.normal_(mlp[2].weight, std=residual_std)
    for linear in (qkv, out, mlp[0], mlp[2]):
        nn.init.zeros_(linear.bias)


def init_blocks(blocks: nn.ModuleList) -> None:
    """`init_layer` for each `Block` of a tower."""
    for block in blocks:
        init_layer(block.attention.qkv, block.attention.out, block.mlp, len(blocks))
