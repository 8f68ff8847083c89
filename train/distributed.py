"""Which rank this process is, and the few things that only one rank does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

from cllip_fast.errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long ranks wait for one another where one alone has work to do: an evaluation outlasts NCCL's ten minutes."""


@dataclass(frozen=True)
class World:
    """One process among `size`; `group` is None for a process alone, so that nothing is ever sent."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @cached_property
    def patient(self) -> dist.ProcessGroup | None:
        """The same ranks on gloo, for CPU tensors and long waits; all ranks must ask for it first at the same place."""
        return None if self.group is None else dist.new_group(backend="gloo", timeout=PATIENCE)

    def barrier(self) -> None:
        """Wait for all ranks, however long one of them evaluates or generates data."""
        if self.group is not None:
            dist.barrier(self.patient)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is True on one."""
        if self.group is None:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the main rank, or its `InputError`, on every rank: all go on from the same."""
        if self.group is None:
            return function()
        answer: list[object] = [None, None]  # result, message
        if self.is_main:
            try:
                answer[0] = function()
            except InputError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        result, message = answer
        if message is not None:
            raise InputError(message)
        return result


@contextmanager
def start(device: str) -> Iterator[World]:
    """Join the other ranks that torchrun started (NCCL on GPUs, gloo on CPUs); leave them at the end."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but PyTorch sees no GPU here")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if size == 1:
        yield World(0, 1, place, None)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=place if device == "cuda" else None)
    try:
        yield World(rank, size, place, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
