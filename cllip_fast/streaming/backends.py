"""The one switch between implementations of a kernel: `backend="auto" | "triton" | "native" | "torch"`."""

from __future__ import annotations

import importlib
from types import ModuleType

from cllip_fast.errors import InputError, check_choice

BACKENDS = ("auto", "triton", "native", "torch")

# operation -> backend -> module of kernels. A new back end is a line here; "auto" takes the first one listed.
_MODULES = {
    "info_nce": {"torch": "cllip_fast.kernels.info_nce.tiles"},
    "distill": {"torch": "cllip_fast.kernels.info_nce.distill_tiles"},
    "sigmoid": {"torch": "cllip_fast.kernels.sigmoid.tiles"},
}


def check_backend(backend: str, operation: str) -> str:
    """Return `backend` if `operation` has it, else raise `InputError` that says what there is."""
    check_choice("backend", backend, BACKENDS)
    if backend != "auto" and backend not in _MODULES[operation]:
        available = ", ".join(["auto", *_MODULES[operation]])
        raise InputError(f"backend is {backend!r}, which {operation} does not have; expected one of {available}")
    return backend


def kernels(backend: str, operation: str) -> ModuleType:
    """The module of kernels that runs `operation`."""
    modules = _MODULES[operation]
    return importlib.import_module(next(iter(modules.values())) if backend == "auto" else modules[backend])
