"""Autocast must not reach into an operator: its tiles choose their own types."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def plain_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of `like`; free of cost where autocast is off."""
    if torch.is_autocast_enabled(like.device.type):
        return torch.autocast(like.device.type, enabled=False)
    return contextlib.nullcontext()
