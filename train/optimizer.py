"""AdamW with the usual no-decay groups, the learning rate of each step and layer, and towers that start frozen."""

from __future__ import annotations

import math

import torch
from torch import nn

from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel, layers_above, parameter_groups
from cllip_fast.models.cllip import TOWERS
from cllip_fast.train.config import Config


def create_optimizer(model: CllipModel, config: Config) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.wd)
    if config.layer_decay != 1 or config.freeze_steps:
        groups = [part for group in groups for part in _by_layer(model, group)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _by_layer(model: CllipModel, group: dict[str, object]) -> list[dict[str, object]]:
    """The group cut by `layers_above`, which each part keeps."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[int | None, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(layers_above(names[parameter], model.config), []).append(parameter)
    return [group | {"params": params, "layers_above": layers} for layers, params in parts.items()]


def learning_rate(step: int, config: Config) -> float:
    """Rate of step 0, 1, …: linear to `lr` over `warmup` steps, then a cosine that ends at 0 after `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, progress)))


def layer_rate(step: int, config: Config, layers: int | None) -> float:
    """`learning_rate` of a layer with so many above it: `layer_decay` less each, and a warm-up of its own when thawed.

    None is what CLIP does not have: it learns at the full rate from the first step.
    """
    rate = learning_rate(step, config)
    if layers is None:
        return rate
    thawed = 1.0
    if config.freeze_steps:
        thawed = min(1.0, max(0, step + 1 - config.freeze_steps) / max(1, config.warmup))
    return rate * thawed * config.layer_decay**layers


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
    for group in optimizer.param_groups:
        group["lr"] = layer_rate(step, config, group.get("layers_above"))


def freeze_towers(model: nn.Module) -> list[nn.Parameter]:
    """Freeze CLIP's towers and logit scale; returns what was frozen and is to be thawed after `freeze_steps`.

    Raises:
        InputError: nothing is left that could be trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = [parameter for name, parameter in trained.items() if name.startswith(TOWERS)]
    if len(frozen) == len(trained):
        raise InputError("--freeze-steps leaves nothing to train: no loss asks for the Prompter")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen
