"""Which parameters get weight decay, and how far each lies from its tower's end."""

from __future__ import annotations

from torch import nn

from cllip_fast.errors import InputError
from cllip_fast.models.config import ModelConfig

_TABLES = ("positions", "class_token", "corner_type", "tokens.weight")
_TOWER_ENDS = ("norm_out", "project")


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


def layers_above(name: str, config: ModelConfig) -> int | None:
    """How many layers of its tower lie above the parameter `name` of a `CllipModel`; None beside CLIP's towers.

    Final norm, projection and logit scale: 0; the last block: 1; the first: the depth; what is before it: depth + 1.
    """
    tower, _, inner = name.partition(".")
    if tower == "logit_scale":
        return 0
    if tower not in ("visual", "text"):
        return None
    depth = config.vision_depth if tower == "visual" else config.text_depth
    module, *rest = inner.split(".")
    if module == "blocks":
        return depth - int(rest[0])
    return 0 if module in _TOWER_ENDS else depth + 1
