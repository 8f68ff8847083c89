"""What the Triton kernels' tuning tables have in common: rows, how one is chosen or searched for, and cases of them
that can be compiled ahead of time, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from cllip_fast.errors import InputError


@dataclass(frozen=True)
class CompileCase:
    """One kernel of one tuning table's row, as it is launched on one architecture.

    Attributes:
        name: "info_nce forward bf16 D512", for tables.
        kernel: the `triton.jit` function.
        signature: argument -> Triton's type name ("*bf16", "*fp32", "i32", "i64", "fp32"), without constants.
        constants: constexpr argument -> value.
        divisible_by_16: arguments (pointers, strides, sizes) that the launch finds divisible by 16.
        num_warps, num_stages: launch options.
        options: more launch options, such as "maxnreg".
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)


LARGE, SMALL = "large", "small"
"""Size classes. Small: tiles of the large class would leave more than half of the device's multiprocessors idle."""

C = TypeVar("C")


@dataclass(frozen=True)
class Table(Generic[C]):
    """The committed configurations of one kernel.

    A launch takes the row of its device's capability, or of the nearest lower one, of its size class, or else of the
    large one. Nothing is searched for, unless the environment has CLLIP_AUTOTUNE=1 (see `choose`).

    Attributes:
        name: of the kernel.
        rows: (capability, size class, kind) -> configuration. Capability 0 is Triton's interpreter; a kind is what else
            decides, such as the features' type and the masks: every capability has all kinds of the large class.
        candidates: (capability, kind) -> configurations that a search tries besides the row's own.
    """

    name: str
    rows: Mapping[tuple[int, str, str], C]
    candidates: Mapping[tuple[int, str], tuple[C, ...]] = field(default_factory=dict)

    def row(self, capability: int, size: str, kind: str) -> C:
        """The configuration for a capability, a size class and a kind."""
        capability = max(each for each, _, known in self.rows if each <= capability and known == kind)
        return self.rows.get((capability, size, kind), self.rows[capability, LARGE, kind])

    def at(self, capability: int) -> dict[tuple[str, str], C]:
        """(size class, kind) -> configuration: the rows of exactly this capability, for compilation ahead of time."""
        return {(size, kind): row for (each, size, kind), row in self.rows.items() if each == capability}

    def tried(self, capability: int, size: str, kind: str) -> list[C]:
        """What a search tries: the row, then the candidates of the nearest lower capability that has some."""
        known = [each for each, of_kind in self.candidates if each <= capability and of_kind == kind]
        more = self.candidates[max(known), kind] if known else ()
        return list(dict.fromkeys((self.row(capability, size, kind), *more)))


def choose(
    table: Table[C],
    kind: str,
    device: torch.device,
    programs: Callable[[C], int],
    launch: Callable[[C], object] | None = None,
) -> C:
    """The configuration for a launch.

    With CLLIP_AUTOTUNE=1 the first launch of each (kernel, capability, size class, kind) times all candidates on its
    own inputs, keeps the fastest for the process and prints the row to add to the table; never while a CUDA graph is
    captured, where nothing can be timed.

    Args:
        table: of the kernel.
        kind: see `Table`.
        device: of the inputs.
        programs: configuration -> how many programs it would launch.
        launch: runs the kernel with a configuration, as often as wanted without lasting effect; None: not to be timed.
    """
    capability = capability_of(device)
    idle = 2 * programs(table.row(capability, LARGE, kind)) < processors(device)
    key = table.name, capability, SMALL if idle else LARGE, kind
    if key not in _found:
        if launch is None or not may_search(device):
            return table.row(*key[1:])
        _found[key] = search(table, *key[1:], launch, str(torch.cuda.get_device_name(device)))
    return _found[key]


_found: dict[tuple[str, int, str, str], Any] = {}  # what searches of this process have found


def may_search(device: torch.device) -> bool:
    """Whether CLLIP_AUTOTUNE=1 asks for a search and one can be made now."""
    wanted = os.environ.get("CLLIP_AUTOTUNE") == "1" and device.type == "cuda"
    return wanted and not torch.cuda.is_current_stream_capturing()


def search(
    table: Table[C],
    capability: int,
    size: str,
    kind: str,
    launch: Callable[[C], object],
    device: str,
    milliseconds: Callable[[Callable[[], object]], float] | None = None,
) -> C:
    """The fastest of `table.tried`; prints it as a row of `table.rows`. One that Triton cannot build is passed over.

    Args:
        table, capability, size, kind: what the row is for.
        launch: see `choose`.
        device: its name, for the printed line.
        milliseconds: times a function; None: `median_milliseconds`.
    """
    from triton import TritonError

    times: dict[C, float] = {}
    for config in table.tried(capability, size, kind):
        with contextlib.suppress(TritonError):  # too much shared memory, too many registers
            times[config] = (milliseconds or median_milliseconds)(functools.partial(launch, config))
    best = min(times, key=times.__getitem__, default=table.row(capability, size, kind))
    took = f"{times[best]:.4f} ms" if times else "none could be built"
    print(f"({capability}, {size!r}, {kind!r}): {best!r},  # {table.name}: {took}, {device}", flush=True)
    return best


def median_milliseconds(run: Callable[[], object], rounds: int = 9) -> float:
    """Median time of `run` on the current stream, after two runs that compile and warm up."""
    for _ in range(2):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(marks))


@functools.cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; 0 for a CPU, that is Triton's interpreter.

    Raises:
        InputError: the GPU is older than any that the kernels are made for.
    """
    if device.type == "cpu":
        return 0
    if torch.version.hip:
        return 80  # AMD's numbers mean something else; what suits sm_80 has no TMA and fits their shared memory
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise InputError(
            f"backend is 'triton', which needs compute capability 8.0 or higher, but {device} has {major}.{minor}"
        )
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 in the interpreter."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
