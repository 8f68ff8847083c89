"""Peak memory of a call on a CPU, above what the process held before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether this system reports a process's peak (Linux does)."""
    return _STATUS.exists() and _RESET.exists()


def peak_bytes(function: Callable[[], object]) -> int:
    """Highest resident memory while `function` runs minus that before, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds would hide new allocations
    _RESET.write_text("5")  # the kernel's command to reset the peak to the present
    before = _field("VmRSS")
    function()
    return _field("VmHWM") - before


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
