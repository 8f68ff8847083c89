"""The DALI loader against the plain one on photographs of 640 × 480: time of a batch, decoded on the CPU or a GPU.

    pytest benchmarks/test_data_dali.py --benchmark-only --benchmark-json .benchmarks/dali.json
    CLLIP_BENCH_SHRINK=64 pytest benchmarks/test_data_dali.py --benchmark-only      # a trial

Loaders under way at once would share the cores, so a round makes each loader anew and takes batches of it alone. Both
have a process or a thread a core to decode with: the plain loader in its workers, DALI on the CPU in its threads,
beside one worker that reads; on a GPU every core reads. The batch ends on the device either way. What counts is
`images_per_second` in `extra_info`; the benchmark's own time includes starting the processes.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import shrunk
from cllip_fast import extras
from cllip_fast.data import Batch, create_loader, train_bpe
from cllip_fast.data.dali import create_dali_loader
from tests.data.painted import record, write_shard
from tests.data.photos import encoded, photo

SAMPLES, BATCH, SIDE, WARM = 1024, 256, 224, 3
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
pytestmark = pytest.mark.skipif(extras.probe("dali") is None, reason="DALI is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    regions = [{"box": [40, 40, 300, 300], "text": "a part"}]
    pictures = [encoded(photo(640, 480, seed), quality=85) for seed in range(16)]
    samples = ((f"p{i}", pictures[i % 16], record(640, 480, regions=regions)) for i in range(shrunk(SAMPLES)))
    write_shard(folder, list(samples))
    return folder


def seconds_per_batch(make: Callable[[], Iterator[Batch]], rounds: int, device: str) -> float:
    """Median time between batches that nobody works on, from a warm loader that is dropped afterwards."""
    stream, times = make(), []
    for _ in itertools.islice(stream, WARM):
        pass
    for _ in range(rounds):
        start = time.perf_counter()
        next(stream).to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("crop", ["pad", "random"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_batches(benchmark: Callable, shards: Path, device: str, crop: str) -> None:
    cores = os.cpu_count() or 1
    settings: dict[str, Any] = {
        "tokenizer": train_bpe(["a picture"], 300), "batch_size": shrunk(BATCH), "image_size": SIDE,
        "text_length": 32, "region_length": 8, "max_regions": 4, "train": True, "crop": crop, "workers": cores,
    }  # fmt: skip
    dali = settings | {"device": device, "threads": cores, "workers": cores if device == "cuda" else 1}
    pinned = {"pin_memory": device == "cuda"}
    loaders: dict[str, Callable[[], Iterator[Batch]]] = {
        "dali": lambda: create_dali_loader(shards, **dali).forever(),
        "plain": lambda: create_loader(shards, **settings, **pinned).forever(),
        "pillow": lambda: create_loader(shards, decoder="pillow", **settings, **pinned).forever(),
    }
    times: dict[str, list[float]] = {name: [] for name in loaders}

    def compare() -> None:
        for name, make in loaders.items():
            times[name].append(seconds_per_batch(make, 9, device))

    benchmark.pedantic(compare, rounds=3)
    rates = {name: settings["batch_size"] / statistics.median(each) for name, each in times.items()}
    benchmark.extra_info.update(device=device, crop=crop, cores=cores, images_per_second=rates)
