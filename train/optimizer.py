"""AdamW with the usual no-decay groups, and the learning rate's warm-up and cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from cllip_fast.models import parameter_groups
from cllip_fast.train.config import Config


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.wd)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Rate of step 0, 1, …: linear to `lr` over `warmup` steps, then a cosine that ends at 0 after `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
