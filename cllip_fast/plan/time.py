"""The least time of a step: products at the device's peak, bytes at its bandwidth, whichever takes longer."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.plan.devices import Device
from cllip_fast.plan.layers import FP32, model_costs
from cllip_fast.plan.loss import loss_cost
from cllip_fast.plan.settings import Settings

WEIGHT_TRAFFIC = 3 * FP32
"""Bytes a parameter: read in forward and backward, its gradient written."""

OPTIMIZER_TRAFFIC = 10 * FP32
"""Bytes a parameter. Clipping: gradient read, read, written. AdamW: weight, gradient, moments read; three written."""


@dataclass(frozen=True)
class Work:
    """One part of a step: floating-point operations, bytes through memory, and the least seconds of each."""

    name: str
    flops: int
    bytes: int
    product_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.product_seconds, self.memory_seconds)


@dataclass(frozen=True)
class Transfer:
    """One kind of communication: bytes that a GPU sends, seconds, what it runs beside, seconds that this leaves."""

    name: str
    bytes: int
    seconds: float
    behind: str
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """All parts of a step, and their sum with the communication that nothing hides."""

    work: tuple[Work, ...]
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.work) + sum(transfer.exposed for transfer in self.transfers)


def predict_time(run: Settings, device: Device) -> StepTime:
    """The least time of a step on this device."""
    parameters, loss = run.parameters(), loss_cost(run)
    peak = device.tf32 if run.element == FP32 else device.bf16

    def work(name: str, products: int, moved: int, rate: float) -> Work:
        return Work(name, 2 * products, moved, 2 * products / rate, moved / device.bandwidth)

    weights = {
        "vision tower": parameters.by_part["visual"],
        "text tower, captions": parameters.by_part["text"],
        "regions, patches": parameters.by_part["prompter"],
    }
    forwards = 2 if run.accum_freq > 1 else 1  # once for the features alone, once with a graph
    towers, backward_seconds = [], 0.0
    for name, cost in model_costs(run).items():
        products = forwards * cost.forward + cost.backward
        moved = cost.traffic + WEIGHT_TRAFFIC * weights.get(name, 0)
        towers.append(work(name, run.accum_freq * products, run.accum_freq * moved, peak))
        backward_seconds += towers[-1].seconds / run.accum_freq * cost.backward / products
    losses = work("losses", loss.products, 2 * loss.features + 2 * loss.gathered, peak)
    optimizer = work("optimizer", 0, OPTIMIZER_TRAFFIC * parameters.trained, peak)

    def transfer(name: str, sent: int, behind: str, hidden: float) -> Transfer:
        seconds = sent / device.interconnect(run.gpus)
        return Transfer(name, sent, seconds, behind, max(0.0, seconds - hidden))

    all_reduce = 2 * FP32 * parameters.trained * (run.gpus - 1) // run.gpus
    transfers = (
        transfer("texts and their gradients", loss.sent, "losses", losses.seconds),
        transfer("gradients, all-reduce", all_reduce, "backward", backward_seconds),
    )
    return StepTime((*towers, losses, optimizer), transfers if run.gpus > 1 else ())
