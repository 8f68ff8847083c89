"""Which patches of a grid lie in a box."""

from __future__ import annotations

import torch
from torch import Tensor


def patches_in_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., 4] xyxy in [0, 1] -> [..., P] bool, P = rows · columns, row by row.

    A patch is in a box if its centre is, borders included. A box that holds no centre takes the patch that holds the
    box's centre (the nearest patch, if that lies outside the image).
    """
    rows, columns = grid
    across = _centres_inside(boxes[..., 0], boxes[..., 2], columns)
    down = _centres_inside(boxes[..., 1], boxes[..., 3], rows)
    inside = (down[..., :, None] & across[..., None, :]).flatten(-2)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    column = (middle[..., 0] * columns).floor().long().clamp(0, columns - 1)
    row = (middle[..., 1] * rows).floor().long().clamp(0, rows - 1)
    nearest = (row * columns + column)[..., None] == torch.arange(rows * columns, device=boxes.device)
    return torch.where(inside.any(-1, keepdim=True), inside, nearest)


def _centres_inside(low: Tensor, high: Tensor, count: int) -> Tensor:
    centres = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    return (centres >= low[..., None]) & (centres <= high[..., None])
