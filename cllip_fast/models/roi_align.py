"""RoIAlign on a grid of patch tokens: the ablation baseline of the Prompter."""

from __future__ import annotations

import torch
from torch import Tensor


def _bilinear_shares(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Mean bilinear weight of each of `size` cells for 2·size points spread evenly over [low, high]: [..., size]."""
    points = 2 * size
    steps = (torch.arange(points, device=low.device, dtype=low.dtype) + 0.5) / points
    position = (low[..., None] + (high - low)[..., None] * steps) * size - 0.5  # cell i has its centre at i
    position = position.clamp(0, size - 1)
    cells = torch.arange(size, device=low.device, dtype=low.dtype)
    return (1 - (position[..., None] - cells).abs()).clamp(min=0).mean(-2)


def roi_align(patch_tokens: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of bilinearly sampled patch tokens over each box (He et al. 2017, one output bin, aligned corners off).

    Sample points form a grid of 2h × 2w inside the box, whatever its size; points beyond the outer patch centres take
    the outer patch. Because the points are a product grid, so are the weights, and the whole operation is one product
    [M, h·w] × [h·w, W] an image. A box that covers the image gives exactly the mean of its patches.

    Args:
        patch_tokens: [B, h*w, W], row by row.
        boxes: [B, M, 4], xyxy in [0, 1].
        grid: (h, w).

    Returns:
        [B, M, W].
    """
    rows, columns = grid
    boxes = boxes.to(patch_tokens.dtype)
    x0, y0, x1, y1 = boxes.unbind(-1)
    vertical = _bilinear_shares(y0, y1, rows)
    horizontal = _bilinear_shares(x0, x1, columns)
    weights = (vertical[..., :, None] * horizontal[..., None, :]).flatten(-2)  # [B, M, h*w]
    return weights @ patch_tokens
