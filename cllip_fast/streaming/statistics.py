"""Softmax statistics across ranks: (maximum, total) of columns combined, losses without cancellation, reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.streaming.walk import Walk

SHARED_SPREAD = 40.0
"""One exponential serves rows and columns in backward if all log-sum-exps lie within this distance of one number."""


def combine(exchange: Exchange, maximum: Tensor, *totals: Tensor) -> tuple[Tensor, ...]:
    """Column statistics Σ e^{s − maximum} over the local rows -> over the rows of all ranks.

    Args:
        exchange: the group.
        maximum: reference of each column on this rank.
        totals: sums relative to it, each of the maximum's shape; a column whose first total is 0 has no pair here.

    Returns:
        (maximum, *totals), the same on every rank.
    """
    if exchange.world_size == 1:
        return maximum, *totals
    lowest = torch.finfo(maximum.dtype).min
    common = exchange.all_max(torch.where(totals[0] == 0, lowest, maximum))
    # Above 0 only where this rank has no pair: infinity times 0 would be NaN.
    summed = exchange.all_sum(torch.stack(totals) * (maximum - common).clamp_max_(0).exp_())
    return common, *summed.unbind()


def settled(maximum: Tensor, total: Tensor) -> Tensor:
    """[2, ...] (maximum, total) for backward: (0, 1) where there is no pair, so that nothing is divided by 0."""
    empty = total == 0
    return torch.stack([maximum.masked_fill(empty, 0), total.masked_fill(empty, 1)])


def negative_log_likelihood(maximum: Tensor, total: Tensor, positive: Tensor) -> Tensor:
    """log(total · e^maximum) − positive, without cancellation where the positive is nearly all of the sum."""
    gap = maximum - positive
    return torch.where(gap < 30, (total * gap.exp()).log(), gap + total.log())


def mean_weight(walk: Walk, local: bool) -> Tensor:
    """[] the weight of one row or column in the mean of both means: 1 / (2 · number of valid rows); finite if none."""
    if walk.valid is not None:
        number = walk.exchange.all_sum(walk.valid.sum(dtype=walk.type))
        return 0.5 / number.clamp_min_(1)
    return walk.scale.new_full((), 0.5 / max(1, walk.rows.shape[0] if local else sum(walk.counts)))


def shared_reference(exchange: Exchange, lse: Tensor) -> float | None:
    """A number within `SHARED_SPREAD` of every log-sum-exp on every rank (0 if possible: it saves a pass), or None.

    Looking at numbers would stall a GPU: there the answer is None, and the kernel takes two exponentials.
    """
    if lse.is_cuda:
        return None
    low, high = lse.aminmax() if lse.numel() else lse.new_zeros(2)
    low, high = exchange.all_max(torch.stack([-low, high])).tolist()
    low = -low
    if not high - low <= 2 * SHARED_SPREAD:
        return None
    return 0.0 if max(high, -low) <= SHARED_SPREAD else (low + high) / 2
