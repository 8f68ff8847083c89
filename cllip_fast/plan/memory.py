"""Peak memory of one GPU, by part, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.plan.devices import RESERVED, Device
from cllip_fast.plan.layers import FP32, model_costs
from cllip_fast.plan.loss import loss_cost
from cllip_fast.plan.settings import OPTIMIZERS, Settings

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
    # Checkpointed layers cast their weights again in backward, one layer at a time: in its working space.
    cast = parameters.cast if run.grad_checkpointing == "none" else parameters.cast_apart
    image = 3 * run.config.image_size**2 * FP32 + 8 * run.text_length
    region = 4 * FP32 + 8 * run.region_length + 1
    lines = {
        "weights, fp32": parameters.total * FP32,
        f"weights, {run.precision[4:]} copies": cast * run.element if run.element != FP32 else 0,
        "gradients": parameters.trained * FP32,
        f"optimizer ({OPTIMIZERS[run.opt]})": optimizer_bytes(run),
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
    """Two moments of each number; torch's AdamW counts each tensor's steps; Muon has one moment for its matrices."""
    parameters = run.parameters()
    if run.opt == "adamw":
        return FP32 * (2 * parameters.trained + parameters.tensors)
    if run.opt == "muon":
        others, tensors = parameters.trained - parameters.hidden, parameters.tensors - parameters.hidden_tensors
        return FP32 * (parameters.hidden + 2 * others + tensors)
    return FP32 * 2 * parameters.trained


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
