"""The one switch between implementations of a kernel: `backend="auto" | "triton" | "native" | "torch"`."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from cllip_fast import extras
from cllip_fast.errors import InputError, check_choice
from cllip_fast.kernels import native

BACKENDS = ("auto", "triton", "native", "torch")

# operation -> backend -> module of kernels. A new back end is a line here; "auto" takes the first one that can run.
_MODULES = {
    "info_nce": {
        "native": "cllip_fast.kernels.info_nce.native",
        "torch": "cllip_fast.kernels.info_nce.tiles",
        "triton": "cllip_fast.kernels.info_nce.triton",
    },
    "distill": {"torch": "cllip_fast.kernels.info_nce.distill_tiles"},
    "sigmoid": {
        "native": "cllip_fast.kernels.sigmoid.native",
        "torch": "cllip_fast.kernels.sigmoid.tiles",
        "triton": "cllip_fast.kernels.sigmoid.triton",
    },
    "patch_text": {
        "native": "cllip_fast.kernels.patch_text.native",
        "torch": "cllip_fast.kernels.patch_text.tiles",
        "triton": "cllip_fast.kernels.patch_text.triton",
    },
    "localize": {
        "torch": "cllip_fast.kernels.localize.tiles",
        "triton": "cllip_fast.kernels.localize.triton",
    },
}
# Triton stands last, so that "auto" never takes it: its kernels have not run on a GPU yet. Once their `gpu` tests have
# passed on one, it goes first.


def check_backend(backend: str, operation: str) -> str:
    """Return `backend` if `operation` has it and it is installed, else raise `InputError` that says what there is."""
    check_choice("backend", backend, BACKENDS)
    if backend != "auto" and backend not in _MODULES[operation]:
        available = ", ".join(["auto", *_MODULES[operation]])
        raise InputError(f"backend is {backend!r}, which {operation} does not have; expected one of {available}")
    if backend == "native":
        native.check_available()
    if backend == "triton":
        extras.require("triton", "backend='triton'")
    return backend


def kernels(backend: str, operation: str, device: torch.device | None = None) -> ModuleType:
    """The module of kernels that runs `operation`.

    Args:
        backend: one that `check_backend` accepted.
        operation: "info_nce", "distill", "sigmoid", "patch_text" or "localize".
        device: of the features, for "auto"; None: a GPU if there is one.
    """
    modules = _MODULES[operation]
    if backend == "auto":
        backend = next(each for each in modules if _can_run(each, device))
    return importlib.import_module(modules[backend])


def _can_run(backend: str, device: torch.device | None) -> bool:
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton":
        return kind == "cuda" and extras.probe("triton") is not None
    if backend == "native":
        return kind == "cpu" and native.available()
    return True
