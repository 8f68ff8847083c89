"""The pairwise sigmoid loss between local rows and the texts of all ranks: the operator and its gradient.

Each rank's loss is that of its own rows against all texts, so only text gradients cross ranks on the way back. On one
rank a pair's gradient is known together with its loss: one pass over the scores gives both. On several ranks, whose
losses may be weighted differently, the scores are computed again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllip_fast.exchange import ALONE, Exchange
from cllip_fast.kernels.products import accumulation_dtype, inner
from cllip_fast.streaming.attach import attach_gradient
from cllip_fast.streaming.backends import kernels
from cllip_fast.streaming.gradients import TextGradients, cast_in_place
from cllip_fast.streaming.info_nce import fake_gathered
from cllip_fast.streaming.once import differentiable_once
from cllip_fast.streaming.plan import gathered_buffer
from cllip_fast.streaming.precision import plain_precision
from cllip_fast.streaming.small import is_small, small_sigmoid_loss
from cllip_fast.streaming.walk import Walk


def sigmoid_loss(
    rows: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    group: str = "",
    chunk_size: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum over (local row, text of any rank) of the pair loss / local rows; see `kernels/sigmoid`.

    Args:
        rows, texts: [n, D] of this rank; text i is the positive of row i. n may differ between ranks.
        logit_scale: [] or [1], already exponentiated.
        logit_bias: [] or [1], or None.
        group: name from `exchange.group_name`.
        chunk_size: texts (over all ranks) in a chunk; 0: chosen.
        backend: one that `check_backend` accepted.

    Returns:
        [] this rank's loss in the accumulation type; gradients are those of the sum of all ranks' losses.
    """
    if is_small("sigmoid", rows, group, chunk_size, backend):
        return small_sigmoid_loss(rows, texts, logit_scale, logit_bias)
    inputs = (rows, texts, logit_scale, logit_bias)
    needs = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in inputs]
    if group != ALONE or not any(needs):
        return _forward(*inputs, group, chunk_size, backend, any(needs))[0]
    fixed = (None if each is None else each.detach() for each in inputs)
    loss, *gradients = _loss_and_gradients(*fixed, chunk_size, backend, *needs)
    for value, gradient, need in zip(inputs, gradients, needs, strict=True):
        loss = attach_gradient(loss, value, gradient) if need else loss
    return loss


@torch.library.custom_op("cllip_fast::sigmoid_loss_and_gradients", mutates_args=())
def _loss_and_gradients(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], d_rows, d_texts, d_scale [], d_bias [] in the accumulation type; 0 elements: not needed."""
    with plain_precision(rows):
        walk = Walk(rows, texts, scale.reshape(()), Exchange(ALONE), (texts.shape[0],), chunk_size)
        offset = None if bias is None else bias.reshape(()).to(walk.type)
        d_rows = walk.scale.new_zeros(rows.shape if need_rows or need_scale else 0)
        d_texts = walk.scale.new_zeros(texts.shape if need_texts else 0)
        d_bias = walk.scale.new_zeros(() if need_bias else 0)
        backward_block = kernels(backend, "sigmoid", rows.device).backward_block
        loss = torch.zeros_like(walk.scale)
        for span, columns, block in walk.blocks(None):
            d_columns = d_texts[span] if need_texts else d_texts
            loss += backward_block(walk.rows, columns, walk.scale, offset, block, d_rows, d_columns, d_bias, walk.space)
        weight = 1 / max(1, rows.shape[0])
        d_scale = inner(d_rows, walk.rows) * weight if need_scale else d_bias.new_empty(0)
        factor = walk.scale * weight
        return (
            loss * weight,
            d_rows.mul_(factor) if need_rows else d_bias.new_empty(0),
            d_texts.mul_(factor),
            d_scale,
            d_bias.mul_(weight),
        )


@_loss_and_gradients.register_fake
def _(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = rows.new_empty((), dtype=accumulation_dtype(rows.dtype))
    return (
        loss,
        loss.new_empty(rows.shape if need_rows else (0,)),
        loss.new_empty(texts.shape if need_texts else (0,)),
        loss.new_empty(() if need_scale else (0,)),
        loss.new_empty(() if need_bias else (0,)),
    )


@torch.library.custom_op("cllip_fast::sigmoid_loss", mutates_args=())
def _forward(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: str,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [], counts [W] (CPU), kept texts."""
    with plain_precision(rows):
        exchange = Exchange(group)
        counts = exchange.row_counts(texts)
        walk = Walk(rows, texts, scale.reshape(()), exchange, counts, chunk_size)
        offset = None if bias is None else bias.reshape(()).to(walk.type)
        kept = gathered_buffer(texts, (len(counts), max(counts)), keep)
        forward_block = kernels(backend, "sigmoid", rows.device).forward_block
        loss = torch.zeros_like(walk.scale)
        for _, columns, block in walk.blocks(kept if kept.numel() else None):
            loss += forward_block(walk.rows, columns, walk.scale, offset, block, walk.space)
        return loss / max(1, rows.shape[0]), torch.tensor(counts), kept


@_forward.register_fake
def _(
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: str,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty((), dtype=accumulation_dtype(rows.dtype)), *fake_gathered(texts, group, keep)


@torch.library.custom_op("cllip_fast::sigmoid_loss_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    kept: Tensor,
    group: str,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d_rows, d_texts, d_scale, d_bias; those not needed have 0 elements."""
    with plain_precision(rows):
        walk = Walk(rows, texts, scale.reshape(()), Exchange(group), tuple(counts.tolist()), chunk_size)
        offset = None if bias is None else bias.reshape(()).to(walk.type)
        weight = gradient.to(walk.type) / max(1, rows.shape[0])
        d_rows = walk.scale.new_zeros(rows.shape if need_rows or need_scale else 0)
        d_texts = TextGradients(walk.exchange, walk.counts, texts.shape[1], walk.scale, need_texts, texts.dtype)
        d_bias = walk.scale.new_zeros(() if need_bias else 0)
        backward_block = kernels(backend, "sigmoid", rows.device).backward_block
        for span, columns, block in walk.blocks(kept if kept.numel() else None, again=True):
            d_columns = d_texts.chunk(span)
            backward_block(walk.rows, columns, walk.scale, offset, block, d_rows, d_columns, d_bias, walk.space)
            d_columns.mul_(weight * walk.scale)  # before it is summed with other ranks', whose weights may differ
            d_texts.send(span)
        d_scale = inner(d_rows, walk.rows) * weight if need_scale else walk.scale.new_empty(0)
        return (
            cast_in_place(d_rows.mul_(weight * walk.scale), rows.dtype) if need_rows else rows.new_empty(0),
            d_texts.collect(rows.shape[0]),
            d_scale.to(scale.dtype),
            d_bias.mul_(weight).to(scale.dtype if bias is None else bias.dtype),
        )


@_backward.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    kept: Tensor,
    group: str,
    chunk_size: int,
    backend: str,
    need_rows: bool,
    need_texts: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape if need_rows else (0,)),
        texts.new_empty(texts.shape if need_texts else (0,)),
        scale.new_empty(() if need_scale else (0,)),
        (scale if bias is None else bias).new_empty(() if need_bias else (0,)),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    rows, texts, scale, bias, *ctx.settings, _ = inputs
    ctx.save_for_backward(rows, texts, scale, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, gradient: Tensor, *_: None) -> tuple:
    needs, saved = ctx.needs_input_grad[:4], ctx.saved_tensors  # unpacked once: checkpointing recomputes at that
    grads = _backward(gradient, *saved, *ctx.settings, *needs)
    shaped = (
        grad.view(value.shape) if need else None for grad, value, need in zip(grads, saved[:4], needs, strict=True)
    )
    return *shaped, *[None] * 4


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
