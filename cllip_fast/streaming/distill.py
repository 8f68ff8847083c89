"""InfoNCE with distillation from a teacher: one walk gives both losses; the operator and its gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.products import accumulation_dtype
from cllip_fast.streaming.backends import kernels
from cllip_fast.streaming.gradients import cast_in_place, row_and_column_weights, softmax_backward, upstream
from cllip_fast.streaming.info_nce import fake_columns, fake_gathered
from cllip_fast.streaming.once import differentiable_once
from cllip_fast.streaming.plan import gathered_buffer
from cllip_fast.streaming.precision import plain_precision
from cllip_fast.streaming.statistics import combine, mean_weight, negative_log_likelihood, settled
from cllip_fast.streaming.walk import Walk


def distill(
    rows: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    teacher_rows: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    *,
    group: str = "",
    local: bool = False,
    gather_grad: bool = True,
    chunk_size: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(contrastive, distillation) losses, scalars; see `kernels/info_nce/distill_tiles.py`.

    Args:
        rows, texts: [n, D] student features; text i is the positive of row i.
        logit_scale: [] or [1], already exponentiated.
        teacher_rows, teacher_texts, teacher_scale: the teacher's, [n, D'] and [] or [1]; constants without gradient.
        group, local, gather_grad, chunk_size, backend: as in `streaming.info_nce`.
    """
    keep = torch.is_grad_enabled() and (rows.requires_grad or texts.requires_grad or logit_scale.requires_grad)
    settings = (group, local, gather_grad, chunk_size, backend, keep)
    return _forward(rows, texts, logit_scale, teacher_rows, teacher_texts, teacher_scale, *settings)[:2]


def _walk(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    exchange: Exchange,
    counts: tuple[int, ...] | None,
    chunk_size: int,
) -> Walk:
    rows, texts = (torch.cat(pair, 1) for pair in zip(student[:2], teacher[:2], strict=True))
    scale = torch.stack([each.reshape(()).to(accumulation_dtype(rows.dtype)) for each in (student[2], teacher[2])])
    return Walk(rows, texts, scale, exchange, counts or exchange.row_counts(texts), chunk_size)


@torch.library.custom_op("cllip_fast::distill", mutates_args=())
def _forward(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> losses [], []; (maximum, total) of student and teacher, of own rows [4, n] and all columns [4, W, n_max];
    weight [], counts [W] (CPU), kept texts.
    """
    with plain_precision(rows):
        exchange = Exchange(group)
        walk = _walk((rows, texts, scale), (teacher_rows, teacher_texts, teacher_scale), exchange, None, chunk_size)
        kernel = kernels(backend, "distill", rows.device)
        size = rows.shape[0]
        by_row, positive = kernel.start_statistics(size, walk.scale), walk.scale.new_zeros(size)
        shape = (exchange.world_size, max(walk.counts))
        by_column = walk.scale.new_zeros((5, *shape))
        kept = gathered_buffer(walk.texts, shape, keep)
        for span, columns, block in walk.blocks(kept if kept.numel() else None):
            arguments = (walk.rows, columns, walk.scale, block, by_row, positive, walk.space)
            by_column[:, :, span] = kernel.forward_block(*arguments, width=rows.shape[1]).view(5, shape[0], -1)
        by_column = torch.stack(combine(exchange, *by_column[:2]) + combine(exchange, *by_column[2:]))
        statistics = torch.stack([by_row, by_column[:, exchange.rank, :size]], 1)
        top, total, _, teacher_total, cross = statistics
        weight = mean_weight(walk, local)
        hard = negative_log_likelihood(top, total, positive).sum()
        soft = (top + total.log() - cross / teacher_total).sum()
        losses = torch.stack([hard, soft]) * weight
        losses = losses if local else exchange.all_sum(losses)
        saved = by_row[:4].clone(), torch.cat([settled(*by_column[:2]), settled(*by_column[2:4])])
        return losses[0].clone(), losses[1].clone(), *saved, weight, torch.tensor(walk.counts), kept


@_forward.register_fake
def _(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    group: str,
    local: bool,
    gather_grad: bool,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = rows.new_empty((), dtype=accumulation_dtype(rows.dtype))
    counts, kept = fake_gathered(texts, group, keep)
    by_row, by_column = loss.new_empty((4, rows.shape[0])), loss.new_empty((4, *fake_columns(texts, group)))
    return loss, torch.empty_like(loss), by_row, by_column, torch.empty_like(loss), counts, kept


@torch.library.custom_op("cllip_fast::distill_backward", mutates_args=())
def _backward(
    contrastive: Tensor,
    soft: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
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
        teacher = (teacher_rows, teacher_texts, teacher_scale)
        walk = _walk((rows, texts, scale), teacher, Exchange(group), tuple(counts.tolist()), chunk_size)
        weights = row_and_column_weights(upstream(torch.stack([contrastive, soft]), walk, local) * weight, walk)
        values = [
            torch.stack([top, (hard + soft) / total, teacher_top, soft / teacher_total, hard])
            for (top, total, teacher_top, teacher_total), (hard, soft) in zip((by_row, by_column), weights, strict=True)
        ]
        d_rows, d_texts, d_scale = softmax_backward(
            walk,
            functools.partial(kernels(backend, "distill", rows.device).backward_block, width=rows.shape[1]),
            *values,
            texts,
            kept,
            reference=None,
            local=local,
            gather_grad=gather_grad,
            needs=(need_rows, need_texts, need_scale),
        )
        return cast_in_place(d_rows, rows.dtype), d_texts, d_scale.to(scale.dtype)


@_backward.register_fake
def _(
    contrastive: Tensor,
    soft: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
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
    *tensors, ctx.group, ctx.local, ctx.gather_grad, ctx.chunk_size, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, contrastive: Tensor, soft: Tensor, *_: None) -> tuple:
    needs, saved = ctx.needs_input_grad[:3], ctx.saved_tensors  # unpacked once: checkpointing recomputes at that
    settings = (ctx.group, ctx.local, ctx.gather_grad, ctx.chunk_size, ctx.backend)
    d_rows, d_texts, d_scale = _backward(contrastive, soft, *saved, *settings, *needs)
    return (
        d_rows if needs[0] else None,
        d_texts if needs[1] else None,
        d_scale.view(saved[2].shape) if needs[2] else None,
        *[None] * 9,
    )


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
