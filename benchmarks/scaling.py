"""Bytes, products and memory of a rank from 1 to 1024 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling ViT-B-16          # or ViT-L-14

The model's and the losses' products and memory are `cllip_fast plan`'s. What `plan` does not have is here, and tested
against counted bytes: the statistics of the losses, and FSDP's traffic.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch

from cllip_fast.models import CllipModel
from cllip_fast.models.blocks import Block
from cllip_fast.plan import Settings, find_device, predict_memory, predict_time
from cllip_fast.plan.loss import is_kept, loss_cost

DEVICE = find_device("h200")
LOSSES = ("clip", "region", "grounding")
MICRO_BATCH = 256  # images at a time, at most; more are accumulated
FP32, BF16 = 4, 2


def clip_loss_bytes(rows: int, width: int, world_size: int, element: int, *, gathers: int = 1) -> float:
    """Bytes that a rank receives, and sends, for one `ClipLoss(gather_with_grad=True)`: texts, gradients, statistics.

    Args:
        rows: local rows, as many on each rank.
        width: D.
        element: bytes of a feature's number.
        gathers: 1, or 2 where gathered texts are too many to keep for backward.
    """
    others = world_size - 1
    features = (gathers + 1) * others * rows * width * element
    columns = 16 * others * rows  # maximum and sum of each column, fp32, two all-reduces
    # Counts and upstream gradients of all ranks; the shared reference, the loss and the scale's gradient.
    scalars = others * (5 * 8 + 4) + 2 * others / world_size * (2 + 2) * FP32
    return features + columns + scalars


def fsdp_bytes(model: CllipModel, world_size: int, element: int, forwards: dict[str, int]) -> tuple[float, ...]:
    """Bytes that a rank receives: of weights gathered in one forward, in one backward, of gradients reduced in a step.

    Rows are dealt out whole: a tensor whose first dimension `world_size` does not divide travels with padding.

    Args:
        element: bytes in which blocks are gathered, but for their norms.
        forwards: how often a forward passes the blocks of a tower, by its name: 2 for "text" with region texts.
    """
    share = (world_size - 1) / world_size
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    inside = {parameter for block in blocks.values() for parameter in block.parameters()}
    rest = _padded((p for p in model.parameters() if p.dim() and p not in inside), world_size)
    forward, backward, reduced = rest * FP32, 0, rest  # what is in no block is kept from forward to backward
    for name, block in blocks.items():
        numbers = _padded(block.parameters(), world_size)
        norms = _padded([*block.norm_1.parameters(), *block.norm_2.parameters()], world_size)
        size = forwards[name.split(".")[0]] * (numbers * element + norms * (FP32 - element))
        forward, backward = forward + size, backward + size
        reduced += numbers
    return share * forward, share * backward, share * reduced * FP32


def _padded(parameters: Iterable[torch.Tensor], world_size: int) -> int:
    return sum(
        math.ceil(each.shape[0] / world_size) * world_size * (each.numel() // each.shape[0]) for each in parameters
    )


def settings(model: str, global_batch: int, gpus: int) -> Settings:
    """The run: the paper's losses and lengths, in micro-batches of at most `MICRO_BATCH` images."""
    batch = global_batch // gpus
    micro = min(batch, MICRO_BATCH)
    return Settings(model, micro, gpus=gpus, accum_freq=batch // micro, text_length=77, region_length=16,
                    losses=LOSSES, grad_checkpointing="blocks")  # fmt: skip


def row(name: str, global_batch: int, gpus: int) -> list[str]:
    """One line of the table: what a rank computes, sends and keeps in a step."""
    run = settings(name, global_batch, gpus)
    time, memory, loss = predict_time(run, DEVICE), predict_memory(run), loss_cost(run)
    seconds = {work.name: work.seconds for work in time.work}
    texts, rows = loss.sent, run.batch_size * run.accum_freq
    statistics = 16 * (gpus - 1) * rows * (1 + run.max_regions)
    model_flops = sum(work.flops for work in time.work) - 2 * loss.products
    with torch.device("meta"):
        model = CllipModel(run.config)
    forward, backward, reduced = fsdp_bytes(model, gpus, BF16, {"visual": 1, "text": 2})
    gathered = run.accum_freq * (forward * (2 if run.accum_freq > 1 else 1) + backward)
    replicated = run.parameters().trained * 4 * FP32  # weights, gradients, two moments
    sharded = memory.peak - memory.lines.get("DDP buckets", 0) - round(replicated * (1 - 1 / gpus))
    text_seconds = texts / DEVICE.interconnect(gpus)
    kept = is_kept(rows * run.max_regions, run.config.embed_dim, gpus, run.element)
    return [
        f"{global_batch // 2**10}k" if global_batch < 2**20 else f"{global_batch // 2**20}M", f"{gpus}",
        f"{rows} = {run.batch_size}·{run.accum_freq}",
        f"{model_flops / 1e12:.0f}", f"{2 * loss.products / 1e12:.1f}", f"{texts / 1e9:.2f}{'' if kept else ' (2)'}",
        f"{statistics / 1e6:.1f}", f"{2 * FP32 * run.parameters().trained * (gpus - 1) / gpus / 1e9:.2f}",
        f"{(gathered + reduced) / 1e9:.2f}", f"{memory.peak / 2**30:.1f}", f"{sharded / 2**30:.1f}",
        f"{1000 * seconds['losses']:.1f}", f"{1000 * text_seconds:.1f}",
    ]  # fmt: skip


HEADER = ["batch", "GPUs", "images a rank", "model TFLOP", "loss TFLOP", "texts GB", "statistics MB", "DDP GB",
          "FSDP GB", "DDP GiB", "FSDP GiB", "losses ms", "texts ms"]  # fmt: skip


def main(name: str = "ViT-B-16") -> None:
    """Print the table of a model."""
    print(f"| {' | '.join(HEADER)} |\n|{' ---: |' * len(HEADER)}")
    for global_batch in (2**15, 2**17, 2**20):
        for gpus in (1, 8, 64, 256, 1024):
            print(f"| {' | '.join(row(name, global_batch, gpus))} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
