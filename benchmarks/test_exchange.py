"""ClipLoss on 4 gloo ranks: bytes that cross ranks, ours against OpenCLIP's, and what of it computation hides.

    pytest benchmarks/test_exchange.py --benchmark-only -s

Prints one table and stores it in `extra_info`. The benchmark's own time includes starting the ranks: look at the table.

* bytes a rank receives in forward and backward (it sends as many): counted at the collectives, and by its sockets
* hidden: all-gathers of chunk c + 1 that were launched before the work on chunk c began and finished before it ended,
  and chunks of text gradients that were home before the next chunk's were done; the first gather and the last
  gradients have nothing to hide behind
* waiting share: time that the rank stood still for collectives in flight / time that they were in flight
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.traffic import Call, Traffic, count_traffic, socket_bytes
from cllip_fast.losses import ClipLoss
from tests import dense
from tests.openclip_peer import openclip_losses
from tests.ranks import on_ranks

WORLD_SIZE, WIDTH, CHUNKS = 4, 512, 4


def gathers_hidden(gathers: list[Call]) -> list[bool]:
    """Whether each gather but the first ran behind the work on the chunk before it."""
    return [
        call.launched <= before.wait_ended and call.finished <= call.wait_began
        for before, call in itertools.pairwise(gathers)
    ]


def trace(gathers: list[Call]) -> list[str]:
    """A line for each chunk but the first, in ms from the first gather's launch."""
    lines = []
    for index, (before, call) in enumerate(itertools.pairwise(gathers)):
        times = (call.launched, call.finished, before.wait_ended, call.wait_began)
        gather = [f"{1000 * (each - gathers[0].launched):.2f}" for each in times]
        lines.append(f"gather {index + 1}: {gather[0]} – {gather[1]}   work on {index}: {gather[2]} – {gather[3]}")
    return lines


def overlap(traffic: Traffic) -> dict[str, Any]:
    gathers, gradients = traffic.asynchronous("all_gather"), traffic.asynchronous("all_to_all")
    hidden = [*gathers_hidden(gathers), *(call.finished <= call.wait_began for call in gradients[:-1])]
    return {
        "hidden": f"{sum(hidden)} of {len(hidden)}",
        "in_flight_ms": round(1000 * traffic.in_flight(), 2),
        "waited_ms": round(1000 * traffic.waited(), 2),
        "waiting_share": round(traffic.waited() / traffic.in_flight(), 3),
        "trace": trace(gathers),
    }


def measure(rank: int, world_size: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    flags = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world_size}
    ours = ClipLoss(**flags, chunk_size=rows * world_size // CHUNKS)
    inputs = [*dense.features(rows, WIDTH, dtype, seed=rank), torch.tensor(20.0)]
    result: dict[str, Any] = {}
    for name, loss in (("peer", openclip_losses().ClipLoss(**flags)), ("ours", ours)):
        dense.value_and_gradients(loss, inputs)  # warm-up
        dist.barrier()
        before = socket_bytes()
        with count_traffic() as traffic:
            dense.value_and_gradients(loss, inputs)
        dist.barrier()
        after = socket_bytes()
        result[name] = {"bytes": traffic.received, "socket_bytes": after and after[1] - before[1]}
    return result | overlap(traffic)


@pytest.mark.parametrize("rows", [512, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_and_overlap(benchmark: Callable, dtype: torch.dtype, rows: int) -> None:
    results = benchmark.pedantic(on_ranks, args=(WORLD_SIZE, measure, rows, dtype), rounds=1)
    title = f"{WORLD_SIZE} ranks × {rows} rows × {WIDTH}, {dtype}, {CHUNKS} chunks"
    columns = [
        "",
        "received, MB",
        "sockets, MB",
        "open_clip, MB",
        "sockets, MB",
        "ours / its",
        "hidden",
        "waiting share",
    ]
    table = [f"| {' | '.join(columns)} |", "| --- |" + " --: |" * (len(columns) - 1)]
    for rank, result in enumerate(results):
        ours, peer = result["ours"], result["peer"]
        numbers = [ours["bytes"], ours["socket_bytes"], peer["bytes"], peer["socket_bytes"]]
        cells = ["–" if each is None else f"{each / 1e6:.3f}" for each in numbers]
        cells += [f"{ours['bytes'] / peer['bytes']:.4f}", result["hidden"], f"{result['waiting_share']:.2f}"]
        table.append(f"| rank {rank} | {' | '.join(cells)} |")
    benchmark.extra_info.update(title=title, table=table, ranks=results, torch=torch.__version__)
    print("\n" + "\n".join([title, "", *table, "", "rank 0, forward, ms:", *results[0]["trace"]]))
