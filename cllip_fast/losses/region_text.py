"""`RegionTextLoss`: InfoNCE between all regions of the global batch and their texts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.exchange import group_name
from cllip_fast.losses.inputs import check_pair, check_scalar, check_threshold
from cllip_fast.streaming import check_backend, chunk_argument, info_nce


class RegionTextLoss(nn.Module):
    """Symmetric InfoNCE over all regions of all images of the global batch (CLOC, arXiv 2410.02746, sec. 3.1).

    The other regions of the same image are negatives as well. A pair (i, j), i ≠ j, leaves both denominators if its
    texts' cosine exceeds `filter_threshold` (no gradient flows through the test) or their group ids are equal; the
    positive always stays. The value is the full-batch loss on every rank, and gradients are such that averaging
    parameter gradients over ranks, as DDP does, gives the full batch's.

    Args:
        filter_threshold: cosine above which two texts are no negatives of each other; None: no filter.
        group: process group over which the batch is spread; None: this process alone.
        backend: "auto", "triton", "native" or "torch".
        chunk_size: texts (over all ranks) that are worked on at a time; None: chosen.

    Raises:
        InputError: a threshold that is no cosine, or a back end that is not available.
    """

    def __init__(
        self,
        *,
        filter_threshold: float | None = 0.9,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.filter_threshold = check_threshold(filter_threshold)
        self.group = group_name(group)
        self.backend = check_backend(backend, "info_nce")
        self.chunk_size = chunk_argument(chunk_size)

    def forward(
        self,
        region_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, [] in fp32 (fp64 for fp64 features), or {"region_loss": it}; 0 if no rank has a region.

        Args:
            region_features: [B, M, D] or [R, D], unit norm; B, M, R may differ between ranks.
            text_features: the same shape; text i names region i.
            logit_scale: [] or [1], already exponentiated.
            mask: [B, M] or [R] bool, True for real regions; None: all are. Padded features are never looked at.
            group_ids: [B, M] or [R] integers; equal ids, on any ranks, mean the same text. Mask and ids must be given
                on all ranks or on none.
            output_dict: return a dict.

        Raises:
            InputError: shapes, types or devices that do not fit. NaN features of real regions give a NaN loss.
        """
        check_tensor("region_features", region_features, floating=True)
        if region_features.dim() not in (2, 3):
            raise InputError(f"region_features has shape {list(region_features.shape)}, expected [B, M, D] or [R, D]")
        shape = tuple(region_features.shape)
        like = ("region_features", region_features)
        check_tensor("text_features", text_features, shape, floating=True, like=like)
        regions, texts = check_pair(
            ("region_features", region_features.reshape(-1, shape[-1])),
            ("text_features", text_features.reshape(-1, shape[-1])),
        )
        if group_ids is not None:
            check_tensor("group_ids", group_ids, shape[:-1], like=like)
            if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
                raise InputError(f"group_ids has dtype {group_ids.dtype}, expected integers")
            group_ids = group_ids.flatten().to(torch.int64)
        if mask is not None:
            mask = check_tensor("mask", mask, shape[:-1], dtype=torch.bool, like=like).flatten()
            if mask.is_cuda or torch.compiler.is_compiling():
                # The number of regions is not known here. Zeros keep NaN in the padding out of the products.
                regions, texts = (each.masked_fill(~mask[:, None], 0) for each in (regions, texts))
            else:
                regions, texts = regions[mask], texts[mask]
                group_ids = None if group_ids is None else group_ids[mask]
                mask = None
        loss = info_nce(
            regions,
            texts,
            check_scalar("logit_scale", logit_scale, regions),
            valid=mask,
            ids=group_ids,
            threshold=self.filter_threshold,
            group=self.group,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        return {"region_loss": loss} if output_dict else loss
