"""Patch localization: the operator, its distributed meaning, its gradient. Only two sums cross ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.patch_text.exclusions import conflicts
from cllip_fast.kernels.products import accumulation_dtype, operand
from cllip_fast.streaming.backends import kernels
from cllip_fast.streaming.once import differentiable_once
from cllip_fast.streaming.precision import plain_precision


def localization(
    patches: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    spans: Tensor,
    *,
    grid: tuple[int, int],
    valid: Tensor,
    ids: Tensor | None = None,
    other_images: bool = False,
    group: str = "",
    backend: str = "auto",
) -> Tensor:
    """The loss of `kernels/localize`: mean over the valid texts of all ranks, a scalar in the accumulation type.

    Args:
        patches: [B, P, D].
        texts: [B, T, D]; those that are not valid must be finite.
        logit_scale: [] or [1], already exponentiated.
        spans: [B, T, 4] int32, the patches in the box of each text: `kernels.localize.boxes.patch_spans`.
        grid: (rows, columns) of patches.
        valid: [B, T] bool.
        ids: [B, T] int64; with `other_images`, images with a text of the same id are left out.
        other_images: the patches of the other local images are wrong answers too.
        group: name from `exchange.group_name`.
        backend: one that `check_backend` accepted.

    Returns:
        [] loss; 0 if no rank has a valid text. Gradients as in `patch_text`.
    """
    return _forward(patches, texts, logit_scale, spans, valid, ids, grid, other_images, group, backend)[0]


def _excluded(texts: Tensor, valid: Tensor, ids: Tensor | None, other_images: bool) -> Tensor | None:
    """[B, B·T] bool: other images whose patches are no wrong answers for a text; None: all of them."""
    if not other_images:
        return None
    columns = texts.flatten(0, 1)
    if ids is None:
        return torch.zeros((valid.shape[0], columns.shape[0]), dtype=torch.bool, device=valid.device)
    return conflicts(valid, operand(columns), ids, ids.flatten())


@torch.library.custom_op("cllip_fast::localization", mutates_args=())
def _forward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    grid: list[int],
    other_images: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [], log-sum-exps inside and outside [2, B, T], weight of a text []."""
    with plain_precision(patches):
        a = scale.reshape(()).to(accumulation_dtype(patches.dtype))
        excluded = _excluded(texts, valid, ids, other_images)
        log_sums = kernels(backend, "localize", patches.device).log_sums
        log_inside, log_outside = log_sums(patches, texts, a, spans, tuple(grid), excluded)
        margin = log_outside - log_inside
        losses = torch.logaddexp(margin, torch.zeros_like(margin)).masked_fill_(~valid, 0)
        total = Exchange(group).all_sum(torch.stack([losses.sum(), valid.sum(dtype=a.dtype)]))
        weight = 1 / total[1].clamp_min(1)
        return total[0] * weight, torch.stack([log_inside, log_outside]), weight


@_forward.register_fake
def _(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    grid: list[int],
    other_images: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = patches.new_empty((), dtype=accumulation_dtype(patches.dtype))
    return loss, loss.new_empty((2, *valid.shape)), torch.empty_like(loss)


@torch.library.custom_op("cllip_fast::localization_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    log_sums: Tensor,
    weight: Tensor,
    grid: list[int],
    other_images: bool,
    group: str,
    backend: str,
    need_patches: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_patches, d_texts, d_scale; those not needed have 0 elements."""
    with plain_precision(patches):
        exchange = Exchange(group)
        a = scale.reshape(()).to(log_sums.dtype)
        log_inside, log_outside = log_sums
        # Without the weight, which would drive the gradients of a large batch below what fp16 can hold.
        pull = (log_outside - log_inside).sigmoid_().masked_fill_(~valid, 0)
        d_patches = log_sums.new_zeros(patches.shape if need_patches else 0)
        d_texts = log_sums.new_zeros(texts.shape if need_texts else 0)
        d_scale = kernels(backend, "localize", patches.device).backward(
            patches,
            texts,
            a,
            spans,
            tuple(grid),
            _excluded(texts, valid, ids, other_images),
            log_inside,
            log_outside,
            pull,
            d_patches,
            d_texts,
        )
        gradient = gradient * weight
        factor = a * exchange.all_sum(gradient)
        if need_scale:
            d_scale = (exchange.all_sum(d_scale) * gradient).to(scale.dtype).reshape(scale.shape)
        return (
            d_patches.mul_(factor).to(patches.dtype) if need_patches else patches.new_empty(0),
            d_texts.mul_(factor).to(texts.dtype) if need_texts else texts.new_empty(0),
            d_scale if need_scale else scale.new_empty(0),
        )


@_backward.register_fake
def _(
    gradient: Tensor,
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    log_sums: Tensor,
    weight: Tensor,
    grid: list[int],
    other_images: bool,
    group: str,
    backend: str,
    need_patches: bool,
    need_texts: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = ((patches, need_patches), (texts, need_texts), (scale, need_scale))
    return tuple(value.new_empty(value.shape if need else 0) for value, need in needs)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, grid, other_images, group, backend = inputs
    _, *saved = output
    ctx.settings = (grid, other_images, group, backend)
    ctx.save_for_backward(*tensors, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient: Tensor | None, *_: None) -> tuple:
    if gradient is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:3]
    grads = _backward(gradient, *ctx.saved_tensors, *ctx.settings, *needs)
    return *(value if need else None for value, need in zip(grads, needs, strict=True)), *[None] * 7


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
