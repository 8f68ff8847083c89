"""Grounding: the box predicted from a text, against the text's box."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import check_choice, check_tensor
from cllip_fast.exchange import group_name
from cllip_fast.kernels.products import accumulation_dtype
from cllip_fast.losses.boxes import box_giou
from cllip_fast.losses.local_inputs import check_mask, check_weight
from cllip_fast.streaming.global_mean import global_mean

KINDS = ("mse", "l1_giou")


class GroundingLoss(nn.Module):
    """How far predicted boxes are from the true ones: the mean over the valid regions of the global batch.

    "mse" (arXiv 2410.02746, section 3.3): mean squared error of the four coordinates.
    "l1_giou" (as in DETR): l1_weight · mean absolute error of the four coordinates + giou_weight · (1 − GIoU).

    Finite, gradients included, for any finite prediction, corners in the wrong order too. Distributed meaning and
    empty batches as for `PatchTextLoss`.

    Args:
        kind: "mse" or "l1_giou".
        l1_weight, giou_weight: of the two parts of "l1_giou", at least 0.
        group: process group over which the batch is spread; None: this process alone.

    Raises:
        InputError: an unknown kind, or a negative weight.
    """

    def __init__(
        self,
        *,
        kind: str = "mse",
        l1_weight: float = 2.5,
        giou_weight: float = 1.0,
        group: dist.ProcessGroup | str | None = None,
    ) -> None:
        super().__init__()
        self.kind = check_choice("kind", kind, KINDS)
        self.l1_weight = check_weight("l1_weight", l1_weight)
        self.giou_weight = check_weight("giou_weight", giou_weight)
        self.group = group_name(group)

    def forward(
        self, predicted_boxes: Tensor, boxes: Tensor, mask: Tensor | None = None, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar in fp32 (fp64 for fp64 predictions), or {"grounding_loss": it}.

        Args:
            predicted_boxes: [B, M, 4] xyxy in [0, 1].
            boxes: [B, M, 4], the truth; no gradient flows to them.
            mask: [B, M] bool, False for padding, which may hold anything. None: all regions are valid.
            output_dict: return a dict.

        Raises:
            InputError: an argument has the wrong shape, type or device.
        """
        first = ("predicted_boxes", predicted_boxes)
        batch, regions, _ = check_tensor("predicted_boxes", predicted_boxes, ("B", "M", 4), floating=True).shape
        check_tensor("boxes", boxes, (batch, regions, 4), floating=True, like=first)
        dtype = accumulation_dtype(predicted_boxes.dtype)
        predicted, truth = predicted_boxes.to(dtype), boxes.detach().to(dtype)
        mask = check_mask("mask", mask, first)
        # Zeroed before the arithmetic too: a gradient of 0 times NaN would be NaN.
        padded = ~mask[..., None]
        losses = self.elementwise(predicted.masked_fill(padded, 0), truth.masked_fill(padded, 0)).masked_fill(~mask, 0)
        loss = global_mean(losses.sum(), mask.sum(dtype=dtype), self.group)
        return {"grounding_loss": loss} if output_dict else loss

    def elementwise(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The loss of each box by itself: [..., 4], [..., 4] -> [...]."""
        if self.kind == "mse":
            return (predicted - truth).square().mean(-1)
        distance = (predicted - truth).abs().mean(-1)
        return self.l1_weight * distance + self.giou_weight * (1 - box_giou(predicted, truth))
