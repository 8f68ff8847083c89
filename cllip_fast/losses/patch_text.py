"""Patch–text contrast: a text finds its image through its best patches."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice
from cllip_fast.exchange import group_name
from cllip_fast.losses.inputs import check_scalar, check_threshold
from cllip_fast.losses.local_inputs import check_ids, check_mask, check_patches_and_texts, check_weight
from cllip_fast.streaming import check_backend, chunk_argument
from cllip_fast.streaming.patch_text import patch_text

POOLS = ("max", "softmax")


class PatchTextLoss(nn.Module):
    """Symmetric InfoNCE between images and texts, whose score is pooled over the patches of the image.

    Text→image: softmax over the images of all ranks. Image→text, for each text: softmax over that text and all texts
    of other images. The loss is the mean of the two, each a mean over the valid texts of the global batch. Other texts
    of the same image are neither positive nor negative. Exact and streamed: B·P × T patch scores are never stored.
    The formulas, and what is kept and recomputed, are in `cllip_fast.kernels.patch_text`.

    On several ranks the value is the global batch's on each of them, and gradients averaged over ranks, as DDP does,
    are the global batch's. Without any valid text, on a rank or on all, the loss is 0 with a graph, never NaN.

    Args:
        pool: "max" (among equal patches the first one gets the gradient), or "softmax": the mean of the scores weighted
            by their softmax.
        pool_temperature: τ of that softmax, > 0.
        filter_threshold: image i is no negative for text j of another image if a valid text of image i has a cosine
            above this to text j; no gradient flows through the test. None: no filter.
        group: process group over which the batch is spread; None: this process alone.
        backend: "auto", "triton", "native" or "torch".
        chunk_size: texts (over all ranks) walked at a time; None: chosen. Has no effect on the result.

    Raises:
        InputError: an option is none of those.
    """

    def __init__(
        self,
        *,
        pool: str = "max",
        pool_temperature: float = 0.1,
        filter_threshold: float | None = None,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.pool = check_choice("pool", pool, POOLS)
        self.pool_temperature = check_weight("pool_temperature", pool_temperature)
        if self.pool_temperature == 0:
            raise InputError("pool_temperature is 0, expected a number above 0; pool='max' is its limit")
        self.filter_threshold = check_threshold(filter_threshold)
        self.backend = check_backend(backend, "patch_text")
        self.chunk_size = chunk_argument(chunk_size)
        self.group = group_name(group)

    def forward(
        self,
        patch_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar in fp32 (fp64 for fp64 features), or {"patch_loss": it}.

        Args:
            patch_features: [B, P, D] unit-norm. B and P may differ between ranks.
            text_features: [B, T, D] unit-norm, the texts of each image.
            logit_scale: [] or [1], already exponentiated.
            mask: [B, T] bool, False for padding, which may hold anything. None: all texts are valid.
            group_ids: [B, T] integers; an image that has a valid text with the id of text j is no negative for it.
            patch_mask: [B, P] bool, False for padding, which may hold anything. An image without any patch takes no
                part, nor do its texts.
            output_dict: return a dict.

        Raises:
            InputError: an argument has the wrong shape, type or device.
        """
        patches, texts = check_patches_and_texts(patch_features, text_features)
        mask = check_mask("mask", mask, ("text_features", texts))
        ids = check_ids(group_ids, ("text_features", texts))
        if patch_mask is not None:
            patch_mask = check_mask("patch_mask", patch_mask, ("patch_features", patches))
            patches = patches.masked_fill(~patch_mask[..., None], 0)
            mask = mask & patch_mask.any(1, keepdim=True)
        loss = patch_text(
            patches,
            # Padding may hold anything: zeros keep NaN out of the products.
            texts.masked_fill(~mask[..., None], 0),
            check_scalar("logit_scale", logit_scale, patches),
            valid=mask,
            ids=ids,
            patch_mask=patch_mask,
            pool=self.pool,
            temperature=self.pool_temperature,
            threshold=self.filter_threshold,
            group=self.group,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        return {"patch_loss": loss} if output_dict else loss
