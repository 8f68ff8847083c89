"""What a rank sends and receives: bytes counted at every collective, when each ran, and what its sockets really moved.

    before = socket_bytes()
    with count_traffic() as traffic:
        loss(*inputs).backward()
    traffic.sent, traffic.received              # bytes of this rank, by the formulas below
    traffic.in_flight(), traffic.waited()       # seconds that asynchronous collectives ran, and that the rank waited

Bytes that each of W ranks sends, and as many that it receives, where b is the size of one tensor:

    all-gather        (W − 1) · b         b: what this rank contributes
    reduce-scatter    (W − 1) · b         b: what this rank keeps
    all-to-all        (W − 1) / W · b     b: all that this rank gives away or keeps
    all-reduce        2 (W − 1) / W · b   reduce-scatter and all-gather of a ring
    scatter           the source sends (W − 1) · b, each other rank receives b

gloo moves just these (compare `socket_bytes`), but for its own reduce-scatter: that is an all-reduce, twice as much,
and the exchange does without it. Times are the host's, which for an accelerator's collectives end too early.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist

from cllip_fast.exchange import exchange

# Name: (argument whose size is b, bytes / b for W ranks).
_COLLECTIVES: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_gather": ("tensor", lambda world_size: world_size - 1),
    "all_gather_into_tensor": ("input_tensor", lambda world_size: world_size - 1),
    "all_gather_single": ("input_tensor", lambda world_size: world_size - 1),
    "reduce_scatter": ("output", lambda world_size: world_size - 1),
    "reduce_scatter_tensor": ("output", lambda world_size: world_size - 1),
    "reduce_scatter_single": ("output", lambda world_size: world_size - 1),
    "all_to_all_single": ("input", lambda world_size: (world_size - 1) / world_size),
    "all_reduce": ("tensor", lambda world_size: 2 * (world_size - 1) / world_size),
    "scatter": ("tensor", lambda world_size: world_size - 1),
}


@dataclass(slots=True)
class Call:
    """One collective on this rank; times are `time.perf_counter`'s, in seconds.

    Attributes:
        name: torch.distributed's.
        sent, received: bytes.
        asynchronous: the caller went on while it ran.
        launched, finished: when it began and when its result was there.
        wait_began, wait_ended: when the caller asked for the result and when it had it.
    """

    name: str
    sent: float
    received: float
    asynchronous: bool
    launched: float
    finished: float = 0.0
    wait_began: float = 0.0
    wait_ended: float = 0.0


@dataclass
class Traffic:
    """The collectives of this rank in the order of their launch."""

    calls: list[Call] = field(default_factory=list)

    @property
    def sent(self) -> float:
        return sum(call.sent for call in self.calls)

    @property
    def received(self) -> float:
        return sum(call.received for call in self.calls)

    def asynchronous(self, name: str = "") -> list[Call]:
        """The asynchronous calls, of those whose name begins with `name`."""
        return [call for call in self.calls if call.asynchronous and call.name.startswith(name)]

    def in_flight(self) -> float:
        """Seconds from launch to result, summed over the asynchronous calls."""
        return sum(call.finished - call.launched for call in self.asynchronous())

    def waited(self) -> float:
        """Seconds that the rank stood still for the asynchronous calls."""
        return sum(call.wait_ended - call.wait_began for call in self.asynchronous())


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Record this rank's collectives, those of `cllip_fast` and of OpenCLIP's losses (autograd's included)."""
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        for name in filter(functools.partial(hasattr, dist), _COLLECTIVES):
            stack.enter_context(mock.patch.object(dist, name, _recorded(getattr(dist, name), traffic)))
        for alias in ("_all_gather", "_reduce_scatter"):
            stack.enter_context(mock.patch.object(exchange, alias, _recorded(getattr(exchange, alias), traffic)))
        yield traffic


class _TimedWork:
    """A `dist.Work` whose `wait` is timed; all that the exchange uses of one."""

    def __init__(self, work: dist.Work, call: Call) -> None:
        self._work, self._call = work, call
        work.get_future().add_done_callback(lambda _: setattr(call, "finished", time.perf_counter()))

    def wait(self) -> None:
        self._call.wait_began = time.perf_counter()
        self._work.wait()
        self._call.wait_ended = time.perf_counter()


def _recorded(function: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    name, signature = function.__name__, inspect.signature(function)
    tensor_name, factor = _COLLECTIVES[name]

    @functools.wraps(function)
    def collective(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        group, size = given.get("group"), given[tensor_name].numel() * given[tensor_name].element_size()
        sent = received = size * factor(dist.get_world_size(group))
        if name == "scatter":
            source = dist.get_rank(group) == given["src"]
            sent, received = (sent, 0) if source else (0, size)
        call = Call(name, sent, received, bool(given.get("async_op")), time.perf_counter())
        traffic.calls.append(call)
        work = function(*args, **kwargs)
        if call.asynchronous:
            return _TimedWork(work, call)
        call.finished = time.perf_counter()
        return work

    return collective


def socket_bytes() -> tuple[int, int] | None:
    """Bytes that this process's TCP connections have (sent, received) so far, the kernel's count; None if not Linux.

    Unlike an interface's counter in /proc/net/dev, it has neither other processes' bytes nor headers.
    """
    if not hasattr(socket, "TCP_INFO"):
        return None
    sent = received = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # no TCP connection, or closed meanwhile
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            # struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received
            acknowledged, arrived = struct.unpack_from("=QQ", info, 120)
            sent, received = sent + acknowledged, received + arrived
    return sent, received
