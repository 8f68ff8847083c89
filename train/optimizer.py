"""The optimizer by name, its groups, the learning rate of each step and layer, and towers that start frozen."""

from __future__ import annotations

import math

import torch
from torch import nn

from cllip_fast.errors import InputError
from cllip_fast.extras import require
from cllip_fast.models import CllipModel, layers_above, parameter_groups
from cllip_fast.models.cllip import TOWERS
from cllip_fast.train.config import Config
from cllip_fast.train.muon import MuonAdamW


def create_optimizer(model: CllipModel, config: Config) -> torch.optim.Optimizer:
    """The optimizer `config.opt`, with groups by weight decay and, where rates differ, by layer.

    Raises:
        InputError: Apex is asked for and cannot be used here.
    """
    groups = parameter_groups(model, config.wd)
    if config.layer_decay != 1 or config.freeze_steps:
        groups = [part for group in groups for part in _by_layer(model, group)]
    adam = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if config.opt == "muon":
        return MuonAdamW(*_hidden_matrices_apart(model, groups), **adam)
    require("apex", f"--opt {config.opt}")
    from apex import optimizers

    try:
        if config.opt == "apex-adam":
            return optimizers.FusedAdam(groups, **adam, adam_w_mode=True)
        # Gradients are clipped before: LAMB's own clipping, at 1 by default, is off.
        return optimizers.FusedLAMB(groups, **adam, adam_w_mode=True, max_grad_norm=math.inf)
    except (RuntimeError, ImportError) as error:
        raise InputError(f"--opt {config.opt} cannot be used here: {error}") from error


def step_unless(found_inf: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step, or none if `found_inf` [] is 1: decided on the device by fused AdamW, else by a look, which waits."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = found_inf
        optimizer.step()
    elif not found_inf.item():
        optimizer.step()


def _by_layer(model: CllipModel, group: dict[str, object]) -> list[dict[str, object]]:
    """The group cut by `layers_above`, which each part keeps."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[int | None, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(layers_above(names[parameter], model.config), []).append(parameter)
    return [group | {"params": params, "layers_above": layers} for layers, params in parts.items()]


def _hidden_matrices_apart(model: CllipModel, groups: list[dict[str, object]]) -> tuple[list, list]:
    """The groups cut in two: matrices of the towers' blocks and of the Prompter's layer, and everything else."""
    layers = [model.visual.blocks, model.text.blocks]
    if model.prompter is not None:
        layers += [model.prompter.qkv, model.prompter.out, model.prompter.mlp]
    hidden = {parameter for layer in layers for parameter in layer.parameters() if parameter.dim() == 2}
    matrices = [group | {"params": [each for each in group["params"] if each in hidden]} for group in groups]
    others = [group | {"params": [each for each in group["params"] if each not in hidden]} for group in groups]
    return [group for group in matrices if group["params"]], [group for group in others if group["params"]]


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
