"""Run a function on several gloo ranks and collect what each returns.

    results = on_ranks(2, check, argument)     # check(rank, world_size, argument) runs on every rank

The function must be importable (module level). It may return anything that `torch.save` takes. A rank that raises
fails the call with that rank's traceback; a rank that hangs is stopped after `timeout` seconds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """[function(rank, world_size, *args) of each rank], run in `world_size` processes under a gloo group."""
    # A server that has done the slow imports forks each rank in milliseconds, and has no threads to break.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "cllip_fast.losses"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                time.sleep(0.01)
                if any(process.exitcode for process in processes):
                    break
            _raise_failure(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _raise_failure(processes: list[Any], folder: Path, timeout: float) -> None:
    if any(process.exitcode for process in processes):
        time.sleep(0.2)  # the rank that failed first may make others fail: let them write their reports too
    reports = [path.read_text() for path in sorted(folder.glob("*.err"))]
    if reports:
        raise AssertionError("\n".join(reports))
    died = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if died:
        raise AssertionError(f"ranks ended with exit codes {died}")
    running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    if running:
        raise AssertionError(f"ranks {running} were still running after {timeout} s")


def _rank(rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        Path(folder, f"{rank}.err").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
