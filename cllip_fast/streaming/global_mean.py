"""A mean over the global batch: the operator, and its gradient as the other losses define it."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.streaming.once import differentiable_once


def global_mean(total: Tensor, number: Tensor, group: str = "") -> Tensor:
    """(Σ over ranks of `total`) / (Σ over ranks of `number`), [] on every rank; 0 if the number is 0.

    The gradient of `total` is that of the sum of all ranks' losses, so that averaging over ranks, as DDP does, gives
    the full batch's.

    Args:
        total: [] this rank's sum.
        number: [] how many terms it has, of the same type.
        group: name from `exchange.group_name`.
    """
    return _forward(total, number, group)[0]


@torch.library.custom_op("cllip_fast::global_mean", mutates_args=())
def _forward(total: Tensor, number: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """-> mean [], weight of a term []."""
    sums = Exchange(group).all_sum(torch.stack([total, number]))
    weight = 1 / sums[1].clamp_min(1)
    return sums[0] * weight, weight


@_forward.register_fake
def _(total: Tensor, number: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total), torch.empty_like(total)


@torch.library.custom_op("cllip_fast::global_mean_backward", mutates_args=())
def _backward(gradient: Tensor, weight: Tensor, group: str) -> Tensor:
    return Exchange(group).all_sum(gradient) * weight


@_backward.register_fake
def _(gradient: Tensor, weight: Tensor, group: str) -> Tensor:
    return torch.empty_like(weight)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    ctx.group = inputs[2]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient: Tensor | None, *_: None) -> tuple:
    if gradient is None:
        return None, None, None
    return _backward(gradient, *ctx.saved_tensors, ctx.group), None, None


_forward.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_backward)
