"""Pointing game (Zhang et al., arXiv 1608.00507): does the patch most similar to a phrase lie in the phrase's box."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.evaluate.regions import mean


def peak_points(maps: Tensor, patch_grid: tuple[int, int]) -> Tensor:
    """Centre of the patch with the largest similarity.

    Args:
        maps: [..., P] text-patch similarities, patches row by row. Of equal ones the first wins.
        patch_grid: (h, w) with h * w == P.

    Returns:
        [..., 2]: x, y in [0, 1] of the image. NaN where the map holds a value that is not finite.
    """
    height, width = patch_grid
    if maps.shape[-1] != height * width:
        raise InputError(f"patch_grid is {patch_grid}, but maps has {maps.shape[-1]} patches")
    peak = maps.argmax(-1)
    points = torch.stack([(peak % width + 0.5) / width, (peak // width + 0.5) / height], -1).float()
    return points.masked_fill(~maps.isfinite().all(-1, keepdim=True), torch.nan)


def hits(points: Tensor, boxes: Tensor, query_index: Tensor) -> Tensor:
    """Whether each point lies in (or on the border of) any of its ground-truth boxes.

    No tolerance is added: a box that holds no patch centre cannot be hit.

    Args:
        points: [Q, 2] x, y, one for each (image, phrase).
        boxes: [R, 4] xyxy in the same units.
        query_index: [R] int64, the point each box belongs to.

    Returns:
        [Q] bool.
    """
    check_tensor("points", points, ("Q", 2), floating=True)
    check_tensor("boxes", boxes, ("R", 4), floating=True)
    check_tensor("query_index", query_index, (len(boxes),), dtype=torch.int64)
    corners = points[query_index]
    inside = ((corners >= boxes[:, :2]) & (corners <= boxes[:, 2:])).all(1)
    return torch.zeros_like(points[:, 0]).scatter_reduce(0, query_index, inside.to(points.dtype), "amax").bool()


def pointing_metrics(hit: Tensor) -> dict[str, float | None]:
    """`pointing`: share of hits of [Q] bool; None of nothing.

    A phrase that occurs several times in an image is asked once, and any of its boxes counts.
    """
    return {"pointing": mean(hit.double())}
