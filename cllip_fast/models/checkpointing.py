"""Activation checkpointing: what a block keeps from forward to backward, and what backward computes again.

    none       everything that backward reads
    selective  its input and the outputs of its linear layers and of fused attention; norms, GELU, sums and attention
               that is written out as products (whose scores are the large part) are computed again
    blocks     its input; the whole block is computed again

Gradients are the same numbers: the same operations on the same inputs, random numbers replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")

MODES = ("none", "selective", "blocks")

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_ATTENTION = ("attention", "attn", "flash")  # in the names of torch's operators, FlashAttention's and xformers'


def run(mode: str, function: Callable[..., T], *inputs: Any) -> T:
    """`function(*inputs)`, of which backward keeps what `mode` says; tensors are kept as `inputs` only."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    device = next(each.device.type for each in inputs if isinstance(each, Tensor))
    if mode == "blocks":
        with _casts_apart(device):
            return checkpoint(function, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    with _casts_apart(device):
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _casts_apart(device: str) -> AbstractContextManager[object]:
    """Autocast, if it is on, without its cache of cast weights.

    A tower that runs twice would find its weights cast in the second forward and not when that is computed again: other
    operations, which selective checkpointing refuses. And the cache would hold all casts until the forward ends.
    """
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    product = operator in _PRODUCTS and not _ends_a_block(*args[-2:])
    if product or any(word in operator.name() for word in _ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _ends_a_block(rows: Tensor, weight: Tensor) -> bool:
    """Whether this is the MLP's second product: nothing reads its output again, it is only added to the input."""
    return weight.shape[0] > weight.shape[1]
