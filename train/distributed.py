"""Which rank this process is, the few things that only one rank does, and which rank it is that hangs."""

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
"""How long ranks wait for one another where one alone has work to do: generating data outlasts NCCL's ten minutes."""

ROLL_CALL = 60.0
"""Seconds, at most, that ranks whose collective has timed out wait for one another to find out who is missing."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's variable; without it all attempts share one store, and find in it the addresses of the attempt before."""


@dataclass(frozen=True)
class World:
    """One process among `size`; `group` is None for a process alone, so that nothing is ever sent.

    `control` has connections of its own (gloo), which still work when a collective of `group` has failed; ranks wait
    `timeout` seconds for one another.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    control: dist.ProcessGroup | None = None
    timeout: float = 1800.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @cached_property
    def patient(self) -> dist.ProcessGroup | None:
        """The same ranks on gloo, for CPU tensors and long waits; all ranks must ask for it first at the same place."""
        return None if self.group is None else dist.new_group(backend="gloo", timeout=PATIENCE)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is True on one. Raises as `roll_call`: a GPU's vote would name nobody."""
        if self.group is None:
            return flag
        self.roll_call()
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the main rank, or its `InputError`, on every rank, however long it takes."""
        if self.group is None:
            return function()
        answer: list[object] = [None, None]  # result, message
        if self.is_main:
            try:
                answer[0] = function()
            except InputError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.patient)
        result, message = answer
        if message is not None:
            raise InputError(message)
        return result

    def roll_call(self, timeout: float | None = None) -> None:
        """Wait until all ranks are here: processes, not what their GPUs still have to do.

        Raises:
            InputError: some are not after `timeout` seconds (default: the world's); the main rank's names them.
        """
        if self.control is None:
            return
        timeout = self.timeout if timeout is None else timeout
        try:
            dist.monitored_barrier(self.control, timeout=timedelta(seconds=timeout), wait_all_ranks=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"a rank hangs or is gone, --timeout is {self.timeout:g} s: {reason}") from error


@contextmanager
def start(device: str, timeout: float = 1800.0) -> Iterator[World]:
    """Join the other ranks that torchrun started (NCCL on GPUs, gloo on CPUs); leave them at the end.

    A collective that times out ends in an `InputError` that names the ranks that were missing.
    """
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
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(OWN_STORE) != "1":
        raise InputError(f"torchrun has --max-restarts, and {OWN_STORE} is not 1: restarted workers would look for the "
                         f"dead ones; start torchrun with {OWN_STORE}=1")  # fmt: skip
    # NCCL's watchdog ends the process and knows only its own rank: the roll call, which knows all, is to come first.
    limit = timedelta(seconds=timeout if device == "cpu" else 2 * timeout)
    backend, own = ("gloo", None) if device == "cpu" else ("nccl", place)
    dist.init_process_group(backend, device_id=own, timeout=limit)
    try:
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        world = World(rank, size, place, dist.group.WORLD, control, timeout)
        with named_hangs(world):
            yield world
    finally:
        dist.destroy_process_group()


@contextmanager
def named_hangs(world: World) -> Iterator[None]:
    """Call the roll when a collective in here times out: all ranks that wait answer, the one that hangs does not."""
    try:
        yield
    except RuntimeError as error:
        message = str(error).lower()
        if "timed out" in message or "timeout" in message:
            world.roll_call(min(world.timeout, ROLL_CALL))
        raise
