"""How much of a device the training uses: model FLOPs utilization by the plan's counts and the data sheets' peaks."""

from __future__ import annotations

import re
import resource
import sys

import torch

from cllip_fast.plan import DEVICES, Device, Settings
from cllip_fast.plan.useful import useful_flops
from cllip_fast.train.config import Config


def recognise(name: str) -> Device | None:
    """The data sheet for a GPU's name, as CUDA gives it; None for other forms than SXM, whose peaks differ."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((DEVICES[word] for word in words if word in DEVICES and not {"pcie", "nvl"} & set(words)), None)


class Speed:
    """Useful FLOPs of a step of this run on one device, and the device's peak where it is known."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        run = Settings(
            model=config.model,
            batch_size=config.batch_size,
            gpus=world_size,
            accum_freq=config.accum_freq,
            image_size=config.image_size,
            text_length=config.text_length,
            region_length=config.region_length,
            max_regions=config.max_regions,
            losses=config.parts,
            region=config.region,
            prompter_pool=config.prompter_pool,
        )
        self.flops = useful_flops(run)
        self._frozen_steps = config.freeze_steps
        self._frozen_flops = useful_flops(run, frozen_towers=True) if config.freeze_steps else 0
        sheet = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = sheet and (sheet.tf32 if config.precision == "fp32" else sheet.bf16)
        images = config.batch_size * config.accum_freq
        of = f"MFU is of {sheet.name}'s {self.peak / 1e12:.0f} TFLOP/s" if sheet else "the device's peak is not known"
        self.description = f"{self.flops / images / 1e9:.3g} GFLOP an image, texts at full length; {of}"

    def figures(self, step: int, seconds: float) -> dict[str, float]:
        """Of a step that took so long: useful `tflops_per_s` of one device, and their share of its peak (`mfu`)."""
        rate = (self._frozen_flops if step <= self._frozen_steps else self.flops) / seconds
        return {"tflops_per_s": rate / 1e12} | ({"mfu": rate / self.peak} if self.peak else {})


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on this GPU; without one, the most memory that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
