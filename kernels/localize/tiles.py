"""Scores of texts with the patches of their own and of other images, plain PyTorch. The maths is in `__init__.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.patch_text.tiling import ScoreBuffer, tile_spans
from cllip_fast.kernels.products import accumulate, accumulation_dtype, operand

_NONE = float("-inf")


def own_scores(patches: Tensor, texts: Tensor) -> Tensor:
    """[B, P, D], [B, T, D] -> [B, T, P] in the accumulation type."""
    texts, patches = operand(texts), operand(patches).transpose(1, 2)
    dtype = accumulation_dtype(texts.dtype)
    return torch.bmm(texts, patches) if texts.dtype == dtype else torch.bmm(texts, patches, out_dtype=dtype)


def own_log_sums(scores: Tensor, scale: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """I and O, [B, T] each, over the own image of each text; O is −inf where the box holds every patch."""
    logits = scores * scale
    return logits.masked_fill(~inside, _NONE).logsumexp(-1), logits.masked_fill(inside, _NONE).logsumexp(-1)


def own_backward(
    patches: Tensor,
    texts: Tensor,
    scores: Tensor,
    scale: Tensor,
    inside: Tensor,
    log_inside: Tensor,
    log_outside: Tensor,
    pull: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> Tensor:
    """Add the gradients, without the factor `scale`, to d_patches [B, P, D] and d_texts [B, T, D]; return Σ G s.

    Args:
        patches, texts, scale, inside: as in the forward; scores: `own_scores` of them.
        log_inside, log_outside: I and O, over all patches, [B, T].
        pull: [B, T] weight of the text × σ(O − I); 0 for padding.
    """
    gradient = torch.where(inside, log_inside[..., None], log_outside[..., None]).neg_().add_(scores * scale).exp_()
    gradient.mul_(torch.where(inside, -pull[..., None], pull[..., None]))
    if d_texts.numel():
        d_texts += _bmm(gradient, operand(patches))
    if d_patches.numel():
        d_patches += _bmm(gradient.transpose(1, 2), operand(texts))
    return (gradient * scores).sum()


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == right.dtype:
        return torch.bmm(left, right)
    return torch.bmm(left.to(right.dtype), right, out_dtype=left.dtype)


def other_log_sums(patches: Tensor, texts: Tensor, scale: Tensor, excluded: Tensor) -> Tensor:
    """[n]: log Σ e^{a s_p} over the patches of all images that are not `excluded`; −inf if none is left.

    Args:
        patches: [B, P, D].
        texts: [n, D] in the products' type.
        scale: [] in the accumulation type.
        excluded: [B, n] bool, the own image among them.
    """
    total = scale.new_full((texts.shape[0],), _NONE)
    buffer = ScoreBuffer(scale.dtype)
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        tile = buffer.scores(operand(patches[images]), texts[columns]).mul_(scale)
        sums = tile.logsumexp(1).masked_fill_(excluded[images, columns], _NONE).logsumexp(0)
        total[columns] = torch.logaddexp(total[columns], sums)
    return total


def other_backward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    excluded: Tensor,
    log_outside: Tensor,
    pull: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> Tensor:
    """As `own_backward`, for the patches of other images: log_outside, pull [n], d_texts [n, D]."""
    total = scale.new_zeros(())
    buffer = ScoreBuffer(scale.dtype)
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        rows = operand(patches[images])
        tile = buffer.scores(rows, texts[columns])
        gradient = torch.mul(tile, scale).sub_(log_outside[columns]).exp_().mul_(pull[columns])
        gradient.masked_fill_(excluded[images, None, columns], 0)
        total += (gradient * tile).sum()
        flat = gradient.flatten(0, 1)
        if d_patches.numel():
            accumulate(d_patches[images].view(flat.shape[0], -1), flat, texts[columns])
        if d_texts.numel():
            accumulate(d_texts[columns], flat.t(), rows.flatten(0, 1))
    return total
