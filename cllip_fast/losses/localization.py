"""Patch localization: the patches inside a text's box, against those outside."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.exchange import group_name
from cllip_fast.kernels.localize.boxes import patch_spans
from cllip_fast.losses.inputs import check_scalar
from cllip_fast.losses.local_inputs import check_ids, check_mask, check_patches_and_texts
from cllip_fast.streaming.backends import check_backend
from cllip_fast.streaming.localization import localization


class PatchLocalizationLoss(nn.Module):
    """-log( Σ_{p in box} e^{a s_p} / Σ_p e^{a s_p} ) for each text with a box, s_p its similarity with patch p.

    The mean over the valid texts of the global batch; distributed meaning and empty batches as for `PatchTextLoss`.
    A patch is in a box if its centre is, borders included; a box without any centre takes the patch that holds the
    box's centre. The formulas are in `cllip_fast.kernels.localize`.

    Args:
        other_images: the patches of the other images of this rank are wrong answers too, walked in tiles; images that
            have a valid text with the same group id are left out.
        group: process group over which the batch is spread; None: this process alone.
        backend: "auto", "triton" or "torch".

    Raises:
        InputError: a back end that is not available.
    """

    def __init__(
        self,
        *,
        other_images: bool = False,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.other_images = other_images
        self.group = group_name(group)
        self.backend = check_backend(backend, "localize")

    def forward(
        self,
        patch_features: Tensor,
        text_features: Tensor,
        boxes: Tensor,
        logit_scale: Tensor,
        mask: Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
        group_ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar in fp32 (fp64 for fp64 features), or {"localization_loss": it}.

        Args:
            patch_features: [B, P, D] unit-norm, P = rows · columns of the grid, row by row.
            text_features: [B, T, D] unit-norm, the texts of each image.
            boxes: [B, T, 4] xyxy in [0, 1] of the image; no gradient flows to them.
            logit_scale: [] or [1], already exponentiated.
            mask: [B, T] bool, False for padding, which may hold anything. None: all texts are valid.
            patch_grid: (rows, columns); None: a square.
            group_ids: [B, T] integers, used with `other_images`.
            output_dict: return a dict.

        Raises:
            InputError: an argument has the wrong shape, type or device, or the grid does not have P patches.
        """
        patches, texts = check_patches_and_texts(patch_features, text_features)
        mask = check_mask("mask", mask, ("text_features", texts))
        ids = check_ids(group_ids, ("text_features", texts))
        check_tensor("boxes", boxes, (*mask.shape, 4), floating=True, like=("patch_features", patches))
        grid = _grid(patch_grid, patches.shape[1])
        loss = localization(
            patches,
            # Padding may hold anything: zeros keep NaN out of the products.
            texts.masked_fill(~mask[..., None], 0),
            check_scalar("logit_scale", logit_scale, patches),
            patch_spans(boxes.detach(), grid),
            grid=grid,
            valid=mask,
            ids=ids if self.other_images else None,
            other_images=self.other_images,
            group=self.group,
            backend=self.backend,
        )
        return {"localization_loss": loss} if output_dict else loss


def _grid(patch_grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if patch_grid is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise InputError(f"patch_grid is None and {patches} patches make no square, expected (rows, columns)")
        return side, side
    rows, columns = patch_grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise InputError(f"patch_grid is {rows} × {columns}, expected a grid of {patches} patches")
    return rows, columns
