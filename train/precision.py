"""The types a run computes in: autocast and fp16's loss scale. Weights, gradients and optimizer are always fp32."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from cllip_fast.errors import InputError

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp_fp16", "fp8")
_TYPES = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def check_precision(name: str) -> None:
    """Refuse what is known by name and not to be had. Raises `InputError`."""
    if name == "fp8":
        raise InputError(
            "--precision is 'fp8', which is not implemented: no measurement has shown fp8 products to gain at these "
            "models' widths (up to 1280) over the scaling that they need; expected amp_bf16"
        )


class Precision:
    """Autocast and loss scale of a run.

    Autocast casts weights for each product and leaves the parameters in fp32: they are the master weights. Gradients
    reach them in fp32 too. Only the range of fp16 is too small for the gradients of activations in between: there the
    loss is scaled, gradients are unscaled before they are clipped, and a step whose gradients overflowed is skipped and
    halves the scale.

    Attributes:
        name: "fp32", "amp_bf16" or "amp_fp16"; "auto" is resolved to bf16 on a GPU and fp32 on a CPU.
        dtype: autocast's; None without.
        autocast: the context that the forward of model and losses belongs in.
        scaler: enabled under fp16, otherwise its methods do nothing. Its verdict is the same on all ranks: gradients
            are reduced, or, where they are sharded (DTensor), the verdict is.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        check_precision(name)
        self.name = name if name != "auto" else "amp_bf16" if device.type == "cuda" else "fp32"
        self.dtype = _TYPES[self.name]
        self.autocast = torch.autocast(device.type, self.dtype) if self.dtype is not None else nullcontext()
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def figures(self) -> dict[str, float]:
        """What the log shows of it; waits for the device."""
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    def describe(self) -> str:
        """One line."""
        if self.name == "fp32":
            return "fp32"
        scaled = ", loss scaled" if self.scaler.is_enabled() else ""
        return f"{self.name}: products in {self.name[4:]}{scaled}; weights, gradients and optimizer in fp32"
