"""Losses, forward and backward, against the peers in the same run: time (peer interleaved) and peak memory.

    pytest benchmarks/ --benchmark-only                    # all sizes; add -m "not slow" to leave the largest out
    pytest benchmarks/ --benchmark-only --benchmark-json results.json

Each row's `extra_info` has: the peer, `speedup` (median time of the peer / ours; above 1 is faster), `peak_mib` and
`peer_peak_mib` (highest memory above the inputs), `products_tflops` (useful work, 6·N²·D operations, per second).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.peak import measurable, peak_bytes
from cllip_fast.losses import ClipLoss, RegionTextLoss, SigLipLoss
from tests import dense
from tests.openclip_peer import openclip_losses

WIDTH = 512
SIZES = [256, 1024, 4096, pytest.param(8192, marks=pytest.mark.slow)]


def compare(
    benchmark: Callable, name: str, ours: Callable[..., Tensor], peer: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Time `ours` with the peer run before every round, then measure the peak memory of both."""
    leaves = [each.requires_grad_(each.is_floating_point()) for each in inputs]

    def step(loss: Callable[..., Tensor]) -> None:
        torch.autograd.grad(loss(*leaves), leaves)

    times: list[float] = []

    def timed_peer() -> None:
        start = time.perf_counter()
        step(peer)
        times.append(time.perf_counter() - start)

    rows = len(inputs[0])
    benchmark.pedantic(step, args=(ours,), setup=timed_peer, rounds=max(5, 10_000 // rows), warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        peer=name,
        rows=rows,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        speedup=round(statistics.median(times[1:]) / seconds, 2),
        products_tflops=round(6 * rows**2 * WIDTH / seconds / 1e12, 4),
    )
    if measurable():
        for key, loss in (("peak_mib", ours), ("peer_peak_mib", peer)):
            benchmark.extra_info[key] = round(peak_bytes(lambda loss=loss: step(loss)) / 2**20, 1)
    print(f"\n{benchmark.name}: " + "  ".join(f"{key} {value}" for key, value in benchmark.extra_info.items()))


def features(rows: int) -> list[Tensor]:
    return list(dense.features(rows, WIDTH, torch.float32))


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("rows", SIZES)
def test_clip(benchmark: Callable, rows: int, scale: float) -> None:
    inputs = [*features(rows), torch.tensor(scale)]
    compare(benchmark, "open_clip ClipLoss", ClipLoss(), openclip_losses().ClipLoss(), inputs)


@pytest.mark.parametrize("rows", SIZES)
def test_siglip(benchmark: Callable, rows: int) -> None:
    inputs = [*features(rows), torch.tensor(10.0), torch.tensor(-10.0)]
    compare(benchmark, "open_clip SigLipLoss", SigLipLoss(), openclip_losses().SigLipLoss(), inputs)


@pytest.mark.parametrize("rows", SIZES)
def test_region_text(benchmark: Callable, rows: int) -> None:
    inputs = [*features(rows), torch.tensor(14.3)]
    inputs[1][rows // 2 :] = inputs[1][: rows - rows // 2]  # every text twice
    compare(benchmark, "dense", RegionTextLoss(), lambda *each: dense.region(*each, threshold=0.9), inputs)
