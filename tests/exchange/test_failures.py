"""One rank of four fails: every other one raises, at the latest when the group's timeout ends."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cllip_fast.exchange import Exchange, group_name
from cllip_fast.losses import ClipLoss, RegionTextLoss
from cllip_fast.streaming import info_nce
from tests import dense

WORLD_SIZE, FAILING = 4, 2
TIMEOUT = 3.0  # seconds, of the group that the loss runs on
SLACK = 12.0  # for a busy machine


def fail_in_user_code() -> None:
    raise ZeroDivisionError("in user code")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step(rank: int, where: str, how: Callable[[], None]) -> None:
    """A step of training in which rank `FAILING` does `how` before the loss, in its forward or in its backward."""
    if rank == FAILING:
        if where == "before":
            how()
        # Both calls come when chunks have been exchanged and others have not.
        setattr(Exchange, {"forward": "all_max", "backward": "reduce_scatter"}[where], lambda *_: how())
    leaves = [each.requires_grad_() for each in dense.features(8, 4, torch.float32, seed=rank)]
    ClipLoss(gather_with_grad=True, group=group_in_use(), chunk_size=8)(*leaves, 10.0).backward()


def bad_argument(rank: int) -> None:
    images, texts = dense.features(8, 4, torch.float32, seed=rank)
    ClipLoss(gather_with_grad=True, group=group_in_use())(images, texts[:7] if rank == FAILING else texts, 10.0)


def bad_width(rank: int) -> None:
    images, texts = dense.features(8, 5 if rank == FAILING else 4, torch.float32, seed=rank)
    ClipLoss(gather_with_grad=True, group=group_in_use())(images, texts, 10.0)


def ids_on_one_rank(rank: int) -> None:
    images, texts = dense.features(8, 4, torch.float32, seed=rank)
    ids = torch.arange(8) if rank == FAILING else None
    RegionTextLoss(group=group_in_use())(images, texts, 10.0, group_ids=ids)


def mask_on_one_rank(rank: int) -> None:
    features = [*dense.features(8, 4, torch.float32, seed=rank), torch.tensor(10.0)]
    info_nce(*features, valid=torch.ones(8) > 0 if rank == FAILING else None, group=group_name(group_in_use()))


def group_in_use() -> dist.ProcessGroup:
    return _groups[-1]


_groups: list[dist.ProcessGroup] = []


def outcomes(stays: bool, function: Callable[..., None], *args: Any) -> list[tuple[float, str]]:
    """(seconds, "error type: message" or "") of function(rank, *args) on each rank that lived to tell.

    Args:
        stays: the failing rank's process lives on until all are through, so that its connections stay open.
        function: run on every rank.
        args: passed on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "cllip_fast.losses"])
    with tempfile.TemporaryDirectory() as folder:
        target = (Path(folder), stays, function, args)
        processes = [context.Process(target=_rank, args=(rank, *target), daemon=True) for rank in range(WORLD_SIZE)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hanging, f"ranks {hanging} hang"
        files = [Path(folder, f"{rank}.json") for rank in range(WORLD_SIZE)]
        return [tuple(json.loads(path.read_text())) if path.exists() else (0.0, "died") for path in files]


def _rank(rank: int, folder: Path, stays: bool, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    _groups.append(dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT)))
    dist.barrier()
    start, error = time.monotonic(), ""
    try:
        function(rank, *args)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    Path(folder, f"{rank}.json").write_text(json.dumps([time.monotonic() - start, error]))
    if stays:
        dist.barrier()
    os._exit(0)  # no farewell to a group that is broken


def assert_all_raise(results: list[tuple[float, str]], failing: str, others: str = "RuntimeError") -> None:
    for rank, (seconds, error) in enumerate(results):
        assert error.startswith(failing if rank == FAILING else others), results
        assert seconds <= TIMEOUT + SLACK, results


@pytest.mark.parametrize("where", ["before", "forward", "backward"])
def test_a_rank_raises_and_lives_on(where: str) -> None:
    assert_all_raise(outcomes(True, step, where, fail_in_user_code), "ZeroDivisionError")


def test_a_rank_raises_and_ends() -> None:
    assert_all_raise(outcomes(False, step, "before", fail_in_user_code), "ZeroDivisionError")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_is_killed(where: str) -> None:
    assert_all_raise(outcomes(False, step, where, be_killed), "died")


def test_bad_input_on_one_rank() -> None:
    assert_all_raise(outcomes(True, bad_argument), "InputError: image_features and text_features must have the same")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (bad_width, "features must have the same width and dtype on every rank"),
        (ids_on_one_rank, "group_ids must be given on every rank or on none, but only ranks [2] have it"),
        (mask_on_one_rank, "mask must be given on every rank or on none"),
    ],
)
def test_bad_input_on_one_rank_is_named_on_all(function: Callable[[int], None], error: str) -> None:
    assert_all_raise(outcomes(True, function), f"InputError: {error}", f"InputError: {error}")
