"""Symmetric InfoNCE between local rows and the texts of all ranks: the operator, its distributed meaning, its gradient.

Row i's positive is text i of the same rank. Texts travel in chunks; rows never leave their rank. What crosses ranks
besides: the columns' (maximum, sum) in two small all-reduces, and the text gradients in one reduce-scatter a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.products import accumulation_dtype
from cllip_fast.streaming.backends import kernels
from cllip_fast.streaming.gradients import cast_in_place, row_and_column_weights, softmax_backward, upstream
from cllip_fast.streaming.once import differentiable_once
from cllip_fast.streaming.plan import gathered_buffer
from cllip_fast.streaming.precision import plain_precision
from cllip_fast.streaming.small import is_small, small_info_nce
from cllip_fast.streaming.statistics import combine, mean_weight, negative_log_likelihood, settled, shared_reference
from cllip_fast.streaming.walk import Walk


def info_nce(
    rows: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    threshold: float | None = None,
    group: str = "",
    local: bool = False,
    gather_grad: bool = True,
    chunk_size: int = 0,
    backend: str = "auto",
) -> Tensor:
    """(mean of row losses + mean of column losses) / 2, a scalar in the accumulation type. See `kernels/info_nce`.

    Args:
        rows: [n, D] local images or regions; n may differ between ranks.
        texts: [n, D]; text i is the positive of row i.
        logit_scale: [] or [1], already exponentiated.
        valid: [n] bool, False for padding (whose features must be finite); None: all rows are real.
        ids: [n] int64; a pair with equal ids, on any ranks, is no negative.
        threshold: a pair whose texts' cosine exceeds it is no negative; None: no filter.
        group: name from `exchange.group_name`.
        local: False: the mean over all ranks, the same value on each. True: the mean over this rank's rows and columns;
            needs the same number of rows on every rank and no masks.
        gather_grad: True: gradients of features are those of the sum of all ranks' losses. False: OpenCLIP's partial
            ones (of this rank's loss alone, gathered features held constant).
        chunk_size: texts (over all ranks) in a chunk; 0: chosen.
        backend: one that `check_backend` accepted.

    Returns:
        [] loss; 0 if there is no valid row on any rank. NaN features give a NaN loss.
    """
    if valid is None and is_small("info_nce", rows, group, chunk_size, backend):
        return small_info_nce(rows, texts, logit_scale, ids, threshold)
    keep = torch.is_grad_enabled() and (rows.requires_grad or texts.requires_grad or logit_scale.requires_grad)
    return _forward(
        rows, texts, logit_scale, valid, ids, threshold, group, local, gather_grad, chunk_size, backend, keep
    )[0]


@torch.library.custom_op("cllip_fast::info_nce", mutates_args=())
def _forward(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    threshold: float | None,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], (maximum, total) of own rows [2, n] and all columns [2, W, n_max], weight [], counts [W] (CPU),
    kept texts.
    """
    with plain_precision(rows):
        exchange = Exchange(group)
        counts = exchange.row_counts(texts, mask=valid, group_ids=ids)
        walk = Walk(rows, texts, scale.reshape(()), exchange, counts, chunk_size, valid, ids, threshold)
        kernel = kernels(backend, "info_nce", rows.device)
        statistics = kernel.RowStatistics.start(rows.shape[0], walk.scale)
        shape = (exchange.world_size, max(counts))
        kept = gathered_buffer(texts, shape, keep)
        column_max, column_sum = walk.scale.new_zeros((2, *shape)).unbind()
        for span, columns, block in walk.blocks(kept if kept.numel() else None):
            top, total = kernel.forward_block(walk.rows, columns, walk.scale, block, statistics, walk.space)
            column_max[:, span] = top.view(shape[0], -1)
            column_sum[:, span] = total.view(shape[0], -1)
        column_max, column_sum = combine(exchange, column_max, column_sum)
        own = (exchange.rank, slice(0, rows.shape[0]))
        maxima = torch.stack([statistics.maximum, column_max[own]])
        totals = torch.stack([statistics.total, column_sum[own]])
        losses = negative_log_likelihood(maxima, totals, statistics.positive)
        if valid is not None:
            losses.masked_fill_(~valid, 0)
        weight = mean_weight(walk, local)
        loss = losses.sum() * weight
        saved = settled(statistics.maximum, statistics.total), settled(column_max, column_sum)
        return loss if local else exchange.all_sum(loss), *saved, weight, torch.tensor(counts), kept


@_forward.register_fake
def _(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    threshold: float | None,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = rows.new_empty((), dtype=accumulation_dtype(rows.dtype))
    counts, kept = fake_gathered(texts, group, keep)
    by_row, by_column = loss.new_empty((2, rows.shape[0])), loss.new_empty((2, *fake_columns(texts, group)))
    return loss, by_row, by_column, torch.empty_like(loss), counts, kept


def fake_gathered(texts: Tensor, group: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Fake counts and kept texts; how many are kept depends on the other ranks, which tracing cannot know."""
    world_size = Exchange(group).world_size
    elements = torch.library.get_ctx().new_dynamic_size() if keep and world_size > 1 else 0
    return torch.empty(world_size, dtype=torch.int64, device="cpu"), texts.new_empty(elements)


def fake_columns(texts: Tensor, group: str) -> tuple[int, int]:
    """(W, n_max), of which the latter depends on the other ranks too."""
    world_size = Exchange(group).world_size
    return world_size, texts.shape[0] if world_size == 1 else torch.library.get_ctx().new_dynamic_size()


@torch.library.custom_op("cllip_fast::info_nce_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    by_row: Tensor,
    by_column: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
    threshold: float | None,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_rows, d_texts, d_scale; those not needed have 0 elements."""
    with plain_precision(rows):
        shared = (Exchange(group), tuple(counts.tolist()), chunk_size)
        walk = Walk(rows, texts, scale.reshape(()), *shared, valid, ids, threshold)
        weights = row_and_column_weights(weight * upstream(gradient, walk, local), walk)
        values = [
            torch.stack([maximum, each / total, each])
            for (maximum, total), each in zip((by_row, by_column), weights, strict=True)
        ]
        lse = torch.cat([(maximum + total.log()).flatten() for maximum, total in (by_row, by_column)])
        d_rows, d_texts, d_scale = softmax_backward(
            walk,
            kernels(backend, "info_nce", rows.device).backward_block,
            *values,
            texts,
            kept,
            reference=shared_reference(walk.exchange, lse),
            local=local,
            gather_grad=gather_grad,
            needs=(need_rows, need_texts, need_scale),
        )
        return cast_in_place(d_rows, rows.dtype), d_texts, d_scale.to(scale.dtype)


@_backward.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    by_row: Tensor,
    by_column: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
    threshold: float | None,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape if need_rows else (0,)),
        texts.new_empty(texts.shape if need_texts else (0,)),
        scale.new_empty(() if need_scale else (0,)),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    rows, texts, scale, valid, ids, *ctx.settings, _ = inputs
    ctx.save_for_backward(rows, texts, scale, valid, ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, gradient: Tensor, *_: None) -> tuple:
    needs, saved = ctx.needs_input_grad[:3], ctx.saved_tensors  # unpacked once: checkpointing recomputes at that
    d_rows, d_texts, d_scale = _backward(gradient, *saved, *ctx.settings, *needs)
    return (
        d_rows if needs[0] else None,
        d_texts if needs[1] else None,
        d_scale.view(saved[2].shape) if needs[2] else None,
        *[None] * 9,
    )


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
