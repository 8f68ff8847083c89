"""Layer norm by name: `torch`, or `apex`, NVIDIA Apex's fused kernel (GPU). Parameters have the same names in both."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice
from cllip_fast.extras import require

NORMS = ("torch", "apex")


def layer_norm(name: str) -> Callable[[int], nn.Module]:
    """What makes a layer norm of a given width. Raises `InputError` if Apex is asked for and absent."""
    if check_choice("norm", name, NORMS) == "torch":
        return nn.LayerNorm
    require("apex", "norm='apex'")
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        raise InputError("norm='apex' needs Apex's CUDA extension fused_layer_norm_cuda, which its build here left out")
    return _apex_norm()


@functools.cache
def _apex_norm() -> type[nn.Module]:
    from apex.normalization import FusedLayerNorm

    class ApexNorm(FusedLayerNorm):
        """Apex's layer norm with the types of torch's: fp32 under autocast, where Apex's own would give fp16 or bf16.

        The first norm's output is the residual stream, which would then be rounded at each block.
        """

        def forward(self, x: Tensor) -> Tensor:
            _check_device(x)
            if torch.is_autocast_enabled(x.device.type):
                x = x.float()
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x)

    return ApexNorm


def _check_device(x: Tensor) -> None:
    """Apex would quietly take torch's norm there."""
    if not x.is_cuda:
        raise InputError(f"norm='apex' got a tensor on {x.device}, expected one on a GPU")
