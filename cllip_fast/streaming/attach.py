"""A gradient that was computed together with its loss, joined to the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllip_fast.streaming.once import differentiable_once


def attach_gradient(loss: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`loss`, whose gradient for `value` is `gradient`.

    Backward scales `gradient` where it lies unless the graph is retained: nothing else may hold it.

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
    if not ctx.needs_input_grad[1]:
        return upstream, None, None
    if type(gradient) is Tensor and not _graph_is_retained():  # while a graph is traced it is another type
        return upstream, gradient.mul_(upstream).to(value.dtype).view(value.shape), None
    return upstream, _scaled(upstream, value, gradient), None


def _graph_is_retained() -> bool:
    """Whether backward may come this way again; True where PyTorch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()


_attach.register_autograd(_gradients, setup_context=_setup)
differentiable_once(_scaled)
