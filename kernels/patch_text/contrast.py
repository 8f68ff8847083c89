"""The InfoNCE over pooled scores, plain PyTorch: the specification. The maths is in `__init__.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.kernels.patch_text.exclusions import conflicts

NO_PAIR = float("-inf")
"""Pooled score of a pair that is neither positive nor negative."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the pairs of B images and t texts are to each other.

    A text is its image's positive. It is no negative of its image, nor where it takes no part, nor of an image that
    has a valid text of its id, or a valid text whose cosine to it exceeds `threshold`. An image without a real patch is
    no negative.

    Attributes:
        owner: [t] int64, the image of each text; −1 if it takes no part; B or more if its image is not among these.
        own_valid: [B, T] bool, which texts of each image take part.
        ids, own_ids: [t] and [B, T] int64; None: ids are not compared.
        own_texts: [B, T, D] of unit length in the products' type; None: no filter by cosine.
        threshold: of the filter.
    """

    owner: Tensor
    own_valid: Tensor
    ids: Tensor | None = None
    own_ids: Tensor | None = None
    own_texts: Tensor | None = None
    threshold: float = 1.0


@dataclass(frozen=True, slots=True)
class Pulls:
    """What the gradient G of the pooled scores follows from:

        text j and its image      G_ij = d_positive_j
        else                      G_ij = row_weight_i e^(a S_ij − row_lse_i) + column_weight_j e^(a S_ij − column_lse_j)

    Attributes:
        scale: [] a.
        row_lse, row_weight: [B].
        column_lse, column_weight, d_positive: [t].
        owner: as in `Pairs`.
    """

    scale: Tensor
    row_lse: Tensor
    row_weight: Tensor
    column_lse: Tensor
    column_weight: Tensor
    d_positive: Tensor
    owner: Tensor


def log_sums(
    pooled: Tensor, texts: Tensor, patch_mask: Tensor | None, scale: Tensor, pairs: Pairs, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """log Σ e^{a S} over the negatives of each image [B] and of each text [t]; −inf where there is none.

    Args:
        pooled: [B, t]; pairs that are neither positive nor negative are set to `NO_PAIR`.
        texts: [t, D] in the products' type.
        patch_mask: [B, P] bool, or None.
        scale: [] a.
        positive: [t] zeros, filled with the pooled scores of texts and their images.
    """
    own = _is_own(pooled, pairs.owner)
    excluded = pairs.owner < 0
    if patch_mask is not None:
        excluded = excluded | ~patch_mask.any(1, keepdim=True)
    excluded = excluded.expand_as(pooled)
    conflicting = conflicts(pairs.own_valid, texts, pairs.own_ids, pairs.ids, pairs.own_texts, pairs.threshold)
    if conflicting is not None:
        excluded = excluded | conflicting
    pooled.masked_fill_(excluded & ~own, NO_PAIR)
    positive += pooled.where(own, 0).sum(0)
    logits = (pooled * scale).masked_fill_(own, NO_PAIR)
    return logits.logsumexp(1), logits.logsumexp(0)


def pooled_gradient(pooled: Tensor, pulls: Pulls, factor: Tensor) -> tuple[Tensor, Tensor]:
    """G · factor [B, t], and [] Σ G S.

    Args:
        pooled: [B, t] as `log_sums` left it.
        pulls: see there.
        factor: [].
    """
    logits = (pooled * pulls.scale).masked_fill_(own := _is_own(pooled, pulls.owner), NO_PAIR)
    gradient = _softmax(logits, pulls.row_lse[:, None], pulls.row_weight[:, None])
    gradient += _softmax(logits, pulls.column_lse, pulls.column_weight)
    gradient = torch.where(own, pulls.d_positive, gradient)
    total = (gradient * finite(pooled)).sum()
    return gradient.mul_(factor), total


def finite(pooled: Tensor) -> Tensor:
    """`pooled` with 0 for `NO_PAIR`, whose gradient is 0: 0 · inf would be NaN."""
    return pooled.masked_fill(pooled == NO_PAIR, 0)


def _is_own(pooled: Tensor, owner: Tensor) -> Tensor:
    """[B, t] bool."""
    return owner == torch.arange(pooled.shape[0], device=pooled.device)[:, None]


def _softmax(logits: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
    """weight · e^(logits − lse)."""
    return (logits - lse).exp_().mul_(weight)
