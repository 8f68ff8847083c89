"""The contrastive losses, forward and backward, against their peers in the same run: time and peak memory.

    pytest benchmarks --benchmark-only --benchmark-json .benchmarks/losses.json   # add -m "not slow": up to 4096 rows
    python -m benchmarks.report .benchmarks/losses.json                           # tables, in benchmarks/results/
    CLLIP_BENCH_SHRINK=16 pytest benchmarks --benchmark-only                      # a trial, all sizes divided by 16

Every round runs our form and each peer once. A row's `extra_info` has the peers' times and everybody's memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.peers import Case, shrunk

WIDTH = 512
SIZES = [256, 1024, 4096, pytest.param(8192, marks=pytest.mark.slow)]
CLIP = [
    *((rows, 14.3) for rows in (256, 1024, 4096)),
    *(pytest.param(8192, scale, marks=pytest.mark.slow) for scale in (14.3, 100.0)),
]


def rounds(rows: int) -> int:
    return max(5, min(50, 20_000 // rows))


def test_matmul(benchmark: Callable) -> None:
    """The rate of a large product, by which the losses' distance from the product limit is told."""
    size = shrunk(4096)
    left, right, out = torch.randn(3, size, size).unbind()
    benchmark.pedantic(torch.mm, args=(left, right), kwargs={"out": out}, rounds=9, warmup_rounds=1)
    benchmark.extra_info.update(loss="matmul", size=[size])


@pytest.mark.parametrize(("rows", "scale"), CLIP)
def test_clip(compare: Callable, rows: int, scale: float) -> None:
    compare(Case("clip", (shrunk(rows), WIDTH), scale), rounds(rows))


@pytest.mark.slow
def test_clip_alone(compare: Callable) -> None:
    """A batch whose dense form would not fit: one pass, no peer."""
    compare(Case("clip", (shrunk(65536), WIDTH)), rounds=1, peers=())


@pytest.mark.parametrize("rows", SIZES)
def test_siglip(compare: Callable, rows: int) -> None:
    compare(Case("siglip", (shrunk(rows), WIDTH), scale=10.0), rounds(rows))


@pytest.mark.parametrize("rows", SIZES)
def test_region_text(compare: Callable, rows: int) -> None:
    """With the conflict filter; every text is there twice."""
    compare(Case("region", (shrunk(rows), WIDTH)), rounds(rows))
