"""A gradient that was computed together with its loss, joined to the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllip_fast.streaming.once import differentiable_once


def attach_gradient(loss: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`loss`, whose gradient for `value` is `gradient`.

    One call for each input, so that backward frees each gradient before the next one is scaled.

    Args:
        loss: [].
        value: of any shape.
        gradient: as many elements as `value`, in the accumulation type.
    """
    return _attach(loss, value, gradient)


@torch.library.custom_op("cllip_fast::attach_gradient", mutates_args=())
def _attach(loss: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return loss.clone()


@_attach.register_fake
def _(loss: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("cllip_fast::attach_gradient_backward", mutates_args=())
def _scaled(upstream: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    scaled = gradient * upstream
    return scaled.to(value.dtype).view(value.shape)


@_scaled.register_fake
def _(upstream: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, upstream: Tensor) -> tuple:
    value, gradient = ctx.saved_tensors
    return upstream, _scaled(upstream, value, gradient) if ctx.needs_input_grad[1] else None, None


_attach.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_scaled)
