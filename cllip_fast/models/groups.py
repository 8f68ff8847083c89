"""Which parameters get weight decay."""

from __future__ import annotations

from torch import nn

from cllip_fast.errors import InputError

_TABLES = ("positions", "class_token", "corner_type", "tokens.weight")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two optimiser groups: matrices and kernels with weight decay; everything else without.

    Without: biases, norms and temperatures (one dimension or none), position tables, class and type vectors, token
    embeddings. Parameters that are frozen are left out.

    Raises:
        InputError: a negative weight decay.
    """
    if weight_decay < 0:
        raise InputError(f"weight_decay is {weight_decay}, expected a number >= 0")
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.dim() < 2 or name.endswith(_TABLES) else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
