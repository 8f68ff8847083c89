"""Which patches of a grid lie in a box: a rectangle of whole patches, so that four integers say it."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_spans(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., 4] xyxy in [0, 1] -> [..., 4] int32: first column, first row, last column, last row, borders included.

    A patch is in a box if its centre is, borders included. A box that holds no centre takes the patch that holds the
    box's centre (the nearest patch, if that lies outside the image). A box that is not finite gets some patch.

    Args:
        boxes: of any floating-point type; compared in fp32 or better.
        grid: (rows, columns) of patches.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    across = _span(boxes[..., 0], boxes[..., 2], grid[1])
    down = _span(boxes[..., 1], boxes[..., 3], grid[0])
    empty = (across[0] > across[1]) | (down[0] > down[1])
    (x0, x1), (y0, y1) = (
        (torch.where(empty, nearest, first), torch.where(empty, nearest, last))
        for first, last, nearest in (across, down)
    )
    return torch.stack([x0, y0, x1, y1], -1).to(torch.int32)


def _span(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(first, last) of `count` patches side by side whose centres are in low … high, and the one nearest its middle."""
    centres = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    first = (centres < low[..., None]).sum(-1)
    last = (centres <= high[..., None]).sum(-1) - 1
    return first, last, ((low + high) / 2 * count).floor().long().clamp(0, count - 1)


def patches_in_spans(spans: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., 4] of `patch_spans` -> [..., P] bool, P = rows · columns, row by row."""
    rows, columns = (torch.arange(count, device=spans.device) for count in grid)
    x0, y0, x1, y1 = spans[..., None].unbind(-2)
    across, down = (columns >= x0) & (columns <= x1), (rows >= y0) & (rows <= y1)
    return (down[..., :, None] & across[..., None, :]).flatten(-2)


def patches_in_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., 4] xyxy in [0, 1] -> [..., P] bool, P = rows · columns, row by row; see `patch_spans`."""
    return patches_in_spans(patch_spans(boxes, grid), grid)
