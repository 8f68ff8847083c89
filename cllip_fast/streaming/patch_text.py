"""Patch–text contrast over all ranks: the operator, its distributed meaning, its gradient.

Patches never leave their rank; texts travel in chunks. What crosses ranks besides: owners and ids of the texts, their
column statistics in two small all-reduces, and the text gradients in one reduce-scatter a chunk. The pooled scores of
the local images with all texts are kept from forward to backward; that of a pair that does not count is −inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.block import lengths
from cllip_fast.kernels.patch_text.contrast import NO_PAIR, Pairs, Pulls
from cllip_fast.kernels.patch_text.tiles import saved_dtype
from cllip_fast.kernels.products import accumulation_dtype, operand
from cllip_fast.streaming.backends import kernels
from cllip_fast.streaming.gradients import TextGradients
from cllip_fast.streaming.once import differentiable_once
from cllip_fast.streaming.patch_walk import PatchGradients, PatchWalk
from cllip_fast.streaming.plan import gathered_buffer
from cllip_fast.streaming.precision import plain_precision


def patch_text(
    patches: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor,
    ids: Tensor | None = None,
    patch_mask: Tensor | None = None,
    pool: str = "max",
    temperature: float = 0.1,
    threshold: float | None = None,
    group: str = "",
    chunk_size: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The loss of `kernels/patch_text`, a scalar in the accumulation type, the same on every rank.

    Args:
        patches: [B, P, D] of the local images; P and B may differ between ranks.
        texts: [B, T, D]; those that are not valid must be finite.
        logit_scale: [] or [1], already exponentiated (so greater than 0).
        valid: [B, T] bool. A valid text's image must have a real patch.
        ids: [B, T] int64; an image with a text of the same id is no negative.
        patch_mask: [B, P] bool; padded patches must be finite. An image without a real patch is no negative.
        pool, temperature: "max", or "softmax" with its temperature.
        threshold: an image with a text whose cosine to text j exceeds it is no negative of j; None: no filter.
        group: name from `exchange.group_name`.
        chunk_size: texts (over all ranks) in a chunk; 0: chosen.
        backend: one that `check_backend` accepted.

    Returns:
        [] loss; 0 if no rank has a valid text. Gradients of features are those of the sum of all ranks' losses, that
        of `logit_scale` is the loss's.
    """
    keep = torch.is_grad_enabled() and (patches.requires_grad or texts.requires_grad or logit_scale.requires_grad)
    return _forward(
        patches,
        texts,
        logit_scale,
        valid,
        ids,
        patch_mask,
        pool,
        temperature,
        threshold,
        group,
        chunk_size,
        backend,
        keep,
    )[0]


@torch.library.custom_op("cllip_fast::patch_text", mutates_args=())
def _forward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    threshold: float | None,
    group: str,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], pooled and saved [B, W·n] chunk after chunk, log-sum-exps of rows [B] and columns [W, n], positives'
    pooled scores [B·T], weight of a text [], counts [W] (CPU), kept texts."""
    with plain_precision(patches):
        exchange = Exchange(group)
        counts = exchange.row_counts(texts.flatten(0, 1))
        accumulator = patches.new_empty(0, dtype=accumulation_dtype(patches.dtype))
        walk = PatchWalk(texts, valid, ids, exchange, counts, chunk_size)
        kernel = kernels(backend, "patch_text", patches.device)
        a = scale.reshape(()).to(accumulator.dtype)
        shape = (len(counts), max(counts))
        pooled = accumulator.new_empty(patches.shape[0], shape[0] * shape[1])
        saved = patches.new_empty(pooled.shape, dtype=saved_dtype(pool, patches))
        positive = accumulator.new_empty(walk.texts.shape[0])
        row_lse = accumulator.new_full((patches.shape[0],), NO_PAIR)
        column_lse = accumulator.new_empty(shape)
        filter_texts = None
        if threshold is not None:
            filter_texts = operand((walk.texts / lengths(walk.texts)[:, None]).to(texts.dtype)).view(texts.shape)
        kept = gathered_buffer(walk.texts, shape, keep)
        for chunk in walk.chunks(kept if kept.numel() else None):
            pairs = Pairs(chunk.owner, valid, chunk.ids, ids, filter_texts, 1.0 if threshold is None else threshold)
            of_texts = accumulator.new_zeros(chunk.texts.shape[0])
            rows, columns = kernel.forward_block(
                patches,
                chunk.texts,
                patch_mask,
                pool,
                temperature,
                a,
                pairs,
                walk.block(pooled, chunk),
                walk.block(saved, chunk),
                of_texts,
            )
            positive[chunk.own_rows] = of_texts[chunk.own_columns]
            row_lse = torch.logaddexp(row_lse, rows)
            column_lse[:, chunk.span] = columns.view(shape[0], -1)
        column_lse = _over_ranks(exchange, column_lse)

        margins = _margins(walk, row_lse, column_lse, positive * a)
        losses = torch.logaddexp(margins, torch.zeros_like(margins)).sum(0).masked_fill_(~valid.flatten(), 0)
        total = exchange.all_sum(torch.stack([losses.sum(), valid.sum(dtype=losses.dtype)]))
        weight = 0.5 / total[1].clamp_min(1)
        return total[0] * weight, pooled, saved, row_lse, column_lse, positive, weight, torch.tensor(counts), kept


def _over_ranks(exchange: Exchange, lse: Tensor) -> Tensor:
    """Log-sum-exps over local images -> over the images of all ranks."""
    if exchange.world_size == 1:
        return lse
    common = exchange.all_max(lse).clamp_min(torch.finfo(lse.dtype).min)
    return common + exchange.all_sum((lse - common).exp()).log()


def _margins(walk: PatchWalk, row_lse: Tensor, column_lse: Tensor, logits: Tensor) -> Tensor:
    """[2, B·T]: how far the negatives (of the text, of its image) exceed each of this rank's positives."""
    columns = column_lse[walk.exchange.rank, : logits.shape[0]]
    return torch.stack([columns, row_lse[walk.image_of]]).sub_(logits)


@_forward.register_fake
def _(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    threshold: float | None,
    group: str,
    chunk_size: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ranks = Exchange(group).world_size
    longest, kept = valid.numel(), 0
    if ranks > 1:
        # Both depend on the other ranks' row counts, which tracing cannot know.
        longest = torch.library.get_ctx().new_dynamic_size()
        kept = torch.library.get_ctx().new_dynamic_size() if keep else 0
    loss = patches.new_empty((), dtype=accumulation_dtype(patches.dtype))
    shape = (patches.shape[0], ranks * longest)
    return (
        loss,
        loss.new_empty(shape),
        loss.new_empty(shape, dtype=saved_dtype(pool, patches)),
        loss.new_empty(shape[0]),
        loss.new_empty(ranks, longest),
        loss.new_empty(valid.numel()),
        torch.empty_like(loss),
        torch.empty(ranks, dtype=torch.int64, device="cpu"),
        texts.new_empty(kept),
    )


@torch.library.custom_op("cllip_fast::patch_text_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor,
    patch_mask: Tensor | None,
    pooled: Tensor,
    saved: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    positive: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
    pool: str,
    temperature: float,
    group: str,
    chunk_size: int,
    backend: str,
    need_patches: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_patches, d_texts, d_scale; those not needed have 0 elements."""
    with plain_precision(patches):
        exchange = Exchange(group)
        # Alone, all texts are at hand: one chunk, after which an image's gradient is complete.
        alone = exchange.world_size == 1
        chunk_size = valid.numel() if alone else chunk_size
        walk = PatchWalk(texts, valid, None, exchange, tuple(counts.tolist()), chunk_size)
        kernel = kernels(backend, "patch_text", patches.device)
        a = scale.reshape(()).to(pooled.dtype)
        pulls = _margins(walk, row_lse, column_lse, positive * a).sigmoid_().mul_(weight)
        pulls.masked_fill_(~valid.flatten(), 0)
        column_weight = exchange.all_gather(pulls[0], walk.counts)
        row_weight = pulls[1].view(valid.shape).sum(1)
        d_positive = pulls.sum(0).neg_()
        # Where there is no negative, every exponential is e^-inf: any finite reference will do.
        row_lse = row_lse.masked_fill(row_lse == NO_PAIR, 0)
        column_lse = column_lse.masked_fill(column_lse == NO_PAIR, 0)

        d_patches = PatchGradients(patches, pooled, need_patches, valid.numel() if alone else None)
        d_texts = TextGradients(
            exchange, walk.counts, texts.shape[2], pooled, need_texts, None if alone else texts.dtype
        )
        d_scale = pooled.new_zeros(())
        factor = a * exchange.all_sum(gradient)
        for chunk in walk.chunks(kept if kept.numel() else None, again=True):
            block, extra = walk.block(pooled, chunk), walk.block(saved, chunk)
            of_columns = [each[:, chunk.span].flatten() for each in (column_lse, column_weight)]
            of_columns.append(walk.columns(d_positive, chunk))
            d_chunk = d_texts.chunk(chunk.span)
            for images in d_patches.spans():
                owner = chunk.owner - images.start
                part = Pulls(a, row_lse[images], row_weight[images], *of_columns, owner)
                d_pooled, total = kernel.pooled_gradient(block[images], part, factor)
                d_scale += total
                d_part = d_patches.part(images)
                kernel.pool_backward(
                    patches[images],
                    chunk.texts,
                    None if patch_mask is None else patch_mask[images],
                    pool,
                    temperature,
                    block[images],
                    extra[images],
                    d_pooled,
                    d_part,
                    d_chunk,
                )
                d_patches.put(images, d_part)
            d_texts.send(chunk.span)
        own_texts = d_texts.collect(walk.texts.shape[0])
        if need_scale:
            d_scale = (exchange.all_sum(d_scale) * gradient).to(scale.dtype).reshape(scale.shape)
        return (
            d_patches.collect(),
            own_texts.to(texts.dtype).view(texts.shape) if need_texts else texts.new_empty(0),
            d_scale if need_scale else scale.new_empty(0),
        )


@_backward.register_fake
def _(
    gradient: Tensor,
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    valid: Tensor,
    patch_mask: Tensor | None,
    pooled: Tensor,
    saved: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    positive: Tensor,
    weight: Tensor,
    counts: Tensor,
    kept: Tensor,
    pool: str,
    temperature: float,
    group: str,
    chunk_size: int,
    backend: str,
    need_patches: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = ((patches, need_patches), (texts, need_texts), (scale, need_scale))
    return tuple(value.new_empty(value.shape if need else 0) for value, need in needs)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    patches, texts, scale, valid, _, patch_mask, pool, temperature, _, group, chunk_size, backend, _ = inputs
    _, *saved = output
    ctx.settings = (pool, temperature, group, chunk_size, backend)
    ctx.save_for_backward(patches, texts, scale, valid, patch_mask, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient: Tensor | None, *_: None) -> tuple:
    if gradient is None:
        return (None,) * 13
    needs = ctx.needs_input_grad[:3]
    grads = _backward(gradient, *ctx.saved_tensors, *ctx.settings, *needs)
    return *(value if need else None for value, need in zip(grads, needs, strict=True)), *[None] * 10


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
