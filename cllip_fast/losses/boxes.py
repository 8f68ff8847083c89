"""Arithmetic of boxes, xyxy: area, IoU, GIoU. Elementwise over leading dimensions, which broadcast.

A box whose corners are in the wrong order, or coincide, has area 0. All functions are finite, and so are their
gradients, for any finite boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_AREA = 1e-12
"""Areas below are divided by as if they had this size: far under one pixel of any image, in shares of the image."""


def box_area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]: width × height, 0 for a box with corners in the wrong order."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union: [..., 4], [..., 4] -> [...] in [0, 1]. 0 if both boxes are empty.

    For all pairs of [n, 4] and [m, 4] pass `first[:, None], second`.
    """
    intersection, union, _ = _areas(first, second)
    return intersection / union.clamp_min(SMALLEST_AREA)


def box_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630, algorithm 1): [..., 4], [..., 4] -> [...] in [-1, 1].

    IoU − (C − U) / C, with U the union's area and C that of the smallest box around both.
    """
    intersection, union, hull = _areas(first, second)
    iou = intersection / union.clamp_min(SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp_min(SMALLEST_AREA)


def _areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of intersection, union and hull."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp_min(0).prod(-1)
    union = box_area(first) + box_area(second) - intersection
    # All corners, so that the hull holds a box with corners in the wrong order too and can never be under the union.
    corners = torch.stack(torch.broadcast_tensors(first[..., :2], first[..., 2:], second[..., :2], second[..., 2:]))
    hull = (corners.amax(0) - corners.amin(0)).prod(-1)
    return intersection, union, hull
