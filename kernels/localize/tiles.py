"""Scores of texts with the patches of their own and of other images, plain PyTorch. The maths is in `__init__.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.localize.boxes import patches_in_spans
from cllip_fast.kernels.patch_text.tiling import ScoreBuffer, tile_spans
from cllip_fast.kernels.products import accumulate, accumulation_dtype, operand

_NONE = float("-inf")


def log_sums(
    patches: Tensor, texts: Tensor, scale: Tensor, spans: Tensor, grid: tuple[int, int], excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """I and O, [B, T] each in the accumulation type; O is −inf where there is no wrong answer.

    Args:
        patches: [B, P, D].
        texts: [B, T, D].
        scale: [] in the accumulation type.
        spans: [B, T, 4] of `boxes.patch_spans`.
        grid: (rows, columns) of patches.
        excluded: [B, B·T] bool, images whose patches are no wrong answers for a text; the text's own image, whether
            named here or not, always gives some. None: no other image does.
    """
    logits = _own_scores(patches, texts) * scale
    inside = patches_in_spans(spans, grid)
    log_inside = logits.masked_fill(~inside, _NONE).logsumexp(-1)
    log_outside = logits.masked_fill(inside, _NONE).logsumexp(-1)
    if excluded is not None:
        others = _other_log_sums(patches, operand(texts.flatten(0, 1)), scale, _without_own(excluded, texts))
        log_outside = torch.logaddexp(log_outside, others.view_as(log_outside))
    return log_inside, log_outside


def backward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    grid: tuple[int, int],
    excluded: Tensor | None,
    log_inside: Tensor,
    log_outside: Tensor,
    pull: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> Tensor:
    """Add the gradients, without the factor `scale`, to d_patches and d_texts; return Σ G s.

    Args:
        patches, texts, scale, spans, grid, excluded: as in the forward.
        log_inside, log_outside: I and O.
        pull: [B, T] σ(O − I); 0 for padding.
        d_patches, d_texts: [B, P, D] and [B, T, D] in the accumulation type; one with 0 elements is not wanted.
    """
    scores, inside = _own_scores(patches, texts), patches_in_spans(spans, grid)
    gradient = torch.where(inside, log_inside[..., None], log_outside[..., None]).neg_().add_(scores * scale).exp_()
    gradient.mul_(torch.where(inside, -pull[..., None], pull[..., None]))
    if d_texts.numel():
        add_products(d_texts, gradient, operand(patches))
    if d_patches.numel():
        add_products(d_patches, gradient.transpose(1, 2), operand(texts))
    total = (gradient * scores).sum()
    if excluded is not None:
        total += _other_backward(
            patches,
            operand(texts.flatten(0, 1)),
            scale,
            _without_own(excluded, texts),
            log_outside.flatten(),
            pull.flatten(),
            d_patches,
            d_texts.flatten(0, 1) if d_texts.numel() else d_texts,
        )
    return total


def _own_scores(patches: Tensor, texts: Tensor) -> Tensor:
    """[B, P, D], [B, T, D] -> [B, T, P] in the accumulation type."""
    texts, patches = operand(texts), operand(patches).transpose(1, 2)
    dtype = accumulation_dtype(texts.dtype)
    return torch.bmm(texts, patches) if texts.dtype == dtype else torch.bmm(texts, patches, out_dtype=dtype)


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [B, n, D] += left [B, n, m] · right [B, m, D]; `left` is rounded to the type of `right`."""
    if right.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left.to(right.dtype), right, out_dtype=total.dtype))


def _without_own(excluded: Tensor, texts: Tensor) -> Tensor:
    """`excluded`, and every text's own image."""
    own = torch.arange(texts.shape[0], device=texts.device)
    return excluded | (own[:, None] == own.repeat_interleave(texts.shape[1]))


def _other_log_sums(patches: Tensor, texts: Tensor, scale: Tensor, excluded: Tensor) -> Tensor:
    """[n]: log Σ e^{a s_p} over the patches of all images that are not `excluded`; −inf if none is left.

    Args:
        texts: [n, D] in the products' type.
        excluded: [B, n] bool, the own image among them.
    """
    total = scale.new_full((texts.shape[0],), _NONE)
    buffer = ScoreBuffer(scale.dtype)
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        tile = buffer.scores(operand(patches[images]), texts[columns]).mul_(scale)
        sums = tile.logsumexp(1).masked_fill_(excluded[images, columns], _NONE).logsumexp(0)
        total[columns] = torch.logaddexp(total[columns], sums)
    return total


def _other_backward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    excluded: Tensor,
    log_outside: Tensor,
    pull: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> Tensor:
    """As `backward`, for the patches of other images: log_outside, pull [n], d_texts [n, D]."""
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
