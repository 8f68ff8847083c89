"""Sinusoidal encodings of points of the image plane."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def encode_points(points: Tensor, width: int, highest: float = 32.0) -> Tensor:
    """Sinusoidal encodings of (x, y) points: the box corners of the Prompter, and the patch centres.

    Frequencies run geometrically from π/2 (one quarter of a period across the image: order is readable) to
    `highest`·π (at 32, 16 periods: 1/128 of the side is readable).

    Args:
        points: [..., 2], (x, y) in [0, 1].
        width: size of the encoding, a multiple of 4: sines and cosines of x, then of y.
        highest: the highest frequency, in units of π.

    Returns:
        [..., width], entries in [-1, 1], each row of norm sqrt(width / 2).
    """
    frequencies = (
        torch.logspace(-1, math.log2(highest), width // 4, base=2, device=points.device, dtype=points.dtype) * math.pi
    )
    angles = points[..., None] * frequencies  # [..., 2, width/4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def patch_centres(grid: tuple[int, int]) -> Tensor:
    """The centres of the patches in [0, 1], row by row: [h*w, 2] as (x, y)."""
    rows, columns = grid
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
