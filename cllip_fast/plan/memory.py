"""Peak memory of one GPU, by part, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.plan.devices import RESERVED, Device
from cllip_fast.plan.layers import FP32, model_costs
from cllip_fast.plan.loss import loss_cost
from cllip_fast.plan.settings import Settings

LARGEST_BATCH = 2**24


@dataclass(frozen=True)
class Memory:
    """Bytes by part, all at the start of backward, and their sum.

    Gradients are counted there although those of the first batch of a step come only as activations go: an upper bound.
    """

    lines: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.lines.values())


def predict_memory(run: Settings) -> Memory:
    """Peak memory of one GPU in a step of training."""
    parameters, costs, loss = run.parameters(), model_costs(run), loss_cost(run)
    image = 3 * run.config.image_size**2 * FP32 + 8 * run.text_length
    region = 4 * FP32 + 8 * run.region_length + 1
    lines = {
        "weights, fp32": parameters.total * FP32,
        "weights, bf16 copies": parameters.cast * run.element if run.element != FP32 else 0,
        "gradients": parameters.trained * FP32,
        "optimizer (AdamW)": optimizer_bytes(run),
        "DDP buckets": parameters.trained * FP32 if run.gpus > 1 else 0,
        "batch": run.batch_size * image + run.regions * region,
        **{name: cost.kept for name, cost in costs.items()},
        "backward's working space": max(cost.working for cost in costs.values()),
        "features, their gradients": loss.features,
        "loss workspace": loss.workspace,
        "gathered texts": loss.gathered,
        "driver, CUDA, libraries": RESERVED,
    }
    return Memory({name: size for name, size in lines.items() if size})


def optimizer_bytes(run: Settings) -> int:
    """AdamW's two moments, and a step counter for each tensor."""
    parameters = run.parameters()
    return FP32 * (2 * parameters.trained + parameters.tensors)


def largest_batch(run: Settings, device: Device) -> int:
    """The largest batch size that fits the device; 0 if not even one image does."""

    def fits(batch: int) -> bool:
        return predict_memory(run.with_batch(batch)).peak <= device.memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
