"""Grounding: does the box predicted from a phrase fit the phrase's ground-truth box."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.errors import check_tensor
from cllip_fast.evaluate.regions import mean
from cllip_fast.losses.boxes import box_iou

THRESHOLD = 0.5


def best_iou(predicted: Tensor, boxes: Tensor, query_index: Tensor) -> Tensor:
    """IoU of each prediction with the best of its ground-truth boxes.

    Args:
        predicted: [Q, 4] xyxy, one for each (image, phrase); corners in the wrong order have IoU 0.
        boxes: [R, 4] xyxy in the same units.
        query_index: [R] int64, the prediction each box belongs to.

    Returns:
        [Q]; 0 for a prediction without a box, or one that is NaN.
    """
    check_tensor("predicted", predicted, ("Q", 4), floating=True)
    check_tensor("boxes", boxes, ("R", 4), floating=True)
    check_tensor("query_index", query_index, (len(boxes),), dtype=torch.int64)
    iou = box_iou(predicted[query_index], boxes).nan_to_num(0.0)
    return torch.zeros_like(predicted[:, 0]).scatter_reduce(0, query_index, iou, "amax")


def grounding_metrics(iou: Tensor | None, own_iou: Tensor | None) -> dict[str, float | None]:
    """Shares of IoU >= 0.5 and means; None without phrases, and where the IoUs are None: the model cannot ground.

    Args:
        iou: [Q], from `best_iou`. A phrase that occurs several times in an image is asked once, and its best-fitting
            box counts: grounding_acc50, grounding_iou.
        own_iou: [R], each region's phrase against the region's own box alone, as RefCOCO's protocol counts referring
            expressions (Yu et al., arXiv 1608.00272): referring_acc50, referring_iou.
    """
    metrics: dict[str, float | None] = {}
    for name, values in (("grounding", iou), ("referring", own_iou)):
        metrics[f"{name}_acc50"] = None if values is None else mean((values >= THRESHOLD).double())
        metrics[f"{name}_iou"] = None if values is None else mean(values.double())
    return metrics
