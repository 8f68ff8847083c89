"""The native CPU kernels: finds the library that `kernels/csrc` is built into, and calls it on blocks of scores.

The library takes a whole block of scores, in fp32: products, exclusions, exponentials, sums and gradients, strip by
strip in the CPU's caches; patch scores image by image. Nothing is loaded before the first call. The environment
variable CLLIP_INSTRUCTION_SET chooses among "avx512", "avx2" and "portable"; unset, it is the best that the CPU has.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.kernels.block import Block

LIBRARY = Path(__file__).with_name("libcllip_native.so")
ABI_VERSION = 4
"""CLLIP_ABI_VERSION of `csrc/cllip_native.h`."""

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""In the order of the header's enumeration: the later, the faster."""

INSTRUCTION_SET_VARIABLE = "CLLIP_INSTRUCTION_SET"


SCREENED = 4
"""The conflict filter first looks at one in so many of a text's numbers, see `csrc/filter.h`."""

SCREENED_FROM = 64
"""Shorter texts are compared whole."""


class _Exclusions(Structure):
    _fields_ = (
        ("row_texts", c_void_p),
        ("row_text_stride", c_int64),
        ("screen", c_int64),
        ("threshold", c_float),
        ("row_ids", c_void_p),
        ("column_ids", c_void_p),
        ("row_valid", c_void_p),
        ("column_valid", c_void_p),
        ("positive_row", c_int64),
        ("positive_column", c_int64),
        ("positive_length", c_int64),
    )


class _Block(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("row_count", c_int64),
        ("row_stride", c_int64),
        ("columns", c_void_p),
        ("column_count", c_int64),
        ("column_stride", c_int64),
        ("width", c_int64),
        ("scale", c_float),
        ("excluded", _Exclusions),
        ("d_rows", c_void_p),
        ("d_columns", c_void_p),
    )


class _Patches(Structure):
    _fields_ = (
        ("patches", c_void_p),
        ("image_count", c_int64),
        ("patch_count", c_int64),
        ("image_stride", c_int64),
        ("patch_stride", c_int64),
        ("texts", c_void_p),
        ("text_count", c_int64),
        ("text_stride", c_int64),
        ("width", c_int64),
        ("patch_valid", c_void_p),
        ("d_patches", c_void_p),
        ("d_texts", c_void_p),
    )


_TABLE = (c_void_p, c_int64)
_SIGNATURES = {
    "cllip_info_nce_forward": (POINTER(_Block), *(c_void_p,) * 5),
    "cllip_info_nce_backward": (POINTER(_Block), c_void_p, c_void_p, c_float, c_int, c_int, c_void_p),
    "cllip_sigmoid_forward": (POINTER(_Block), c_float, POINTER(c_double)),
    "cllip_sigmoid_backward": (POINTER(_Block), c_float, POINTER(c_double), POINTER(c_double)),
    "cllip_max_pool": (POINTER(_Patches), *_TABLE, *_TABLE, c_int),
    "cllip_max_pool_backward": (POINTER(_Patches), *_TABLE, c_int, *_TABLE),
    "cllip_softmax_pool": (POINTER(_Patches), c_float, *_TABLE, *_TABLE),
    "cllip_softmax_pool_backward": (POINTER(_Patches), c_float, *_TABLE, *_TABLE, *_TABLE),
}
_ERRORS = {1: "out of memory", 2: "no such instruction set"}


def available() -> bool:
    """Whether the library is built and fits this version of the package."""
    return not isinstance(_load(LIBRARY), str)


def describe() -> str:
    """One line for a log: "native kernels: avx512, OpenMP", or why there are none."""
    library = _load(LIBRARY)
    if isinstance(library, str):
        return f"native kernels: not built ({library}); CPU losses run on plain PyTorch, slower"
    threads = "OpenMP" if library.cllip_has_openmp() else "one thread (built without OpenMP)"
    return f"native kernels: {instruction_set()}, {threads}"


def check_available(name: str = "backend") -> None:
    """Raise `InputError` that says why if the library cannot be used."""
    library = _load(LIBRARY)
    if isinstance(library, str):
        raise InputError(f"{name} is 'native', but the native kernels are not built: {library}")


def instruction_sets() -> tuple[str, ...]:
    """Those that the library and this CPU have, the best one last."""
    bits = _library().cllip_instruction_sets()
    return tuple(name for index, name in enumerate(INSTRUCTION_SETS) if bits >> index & 1)


def instruction_set() -> str:
    """The one in use."""
    have = instruction_sets()
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE, "") or have[-1]
    if wanted not in have:
        raise InputError(f"{INSTRUCTION_SET_VARIABLE} is {wanted!r}, expected one of {', '.join(have)} on this CPU")
    return wanted


def runs(rows: Tensor) -> bool:
    """Whether products of `rows` have native kernels: fp32, while fp64 is left to plain PyTorch.

    Raises:
        InputError: `rows` are not on the CPU, or the library is not built.
    """
    if not rows.is_cpu:
        raise InputError(f"backend is 'native', which runs on the CPU only, but the features are on {rows.device}")
    check_available()
    return rows.dtype == torch.float32


def call(
    function: str,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    block: Block,
    *arguments: object,
    d_rows: Tensor | None = None,
    d_columns: Tensor | None = None,
) -> None:
    """Run `function` of `csrc/cllip_native.h` on the scores of rows [n, D] and columns [m, D].

    Args:
        function: its name without the prefix "cllip_".
        rows, columns, scale, block: fp32, see `kernels/info_nce/tiles.py`.
        arguments: what the C function takes between the block and the instruction set; tensors (fp32, contiguous, or
            None) for pointers.
        d_rows, d_columns: accumulators, contiguous; None or one with 0 elements is not wanted.
    """
    rows, columns = _last_contiguous(rows), _last_contiguous(columns)
    held: list[Tensor] = []
    problem = _Block(
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        columns.data_ptr(),
        columns.shape[0],
        columns.stride(0),
        rows.shape[1],
        scale.item(),
        _exclusions(block, held),
        *map(_accumulator, (d_rows, d_columns)),
    )
    _run(function, problem, arguments)


def call_patches(
    function: str,
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    *arguments: object,
    d_patches: Tensor | None = None,
    d_texts: Tensor | None = None,
) -> None:
    """Run `function` of `csrc/cllip_native.h` on the scores of patches [B, P, D] and texts [t, D].

    Args:
        function: its name without the prefix "cllip_".
        patches, texts, patch_mask: fp32, see `kernels/patch_text/tiles.py`.
        arguments: what the C function takes between these and the instruction set; tables come from `table`.
        d_patches, d_texts: accumulators, contiguous; None or one with 0 elements is not wanted.
    """
    patches, texts = _last_contiguous(patches), _last_contiguous(texts)
    valid = None if patch_mask is None else patch_mask.contiguous()
    problem = _Patches(
        patches.data_ptr(),
        *patches.shape[:2],
        *patches.stride()[:2],
        texts.data_ptr(),
        texts.shape[0],
        texts.stride(0),
        texts.shape[1],
        None if valid is None else valid.data_ptr(),
        *map(_accumulator, (d_patches, d_texts)),
    )
    _run(function, problem, arguments)


def table(values: Tensor) -> tuple[int, int]:
    """[n, m] as the library takes it: its address and the elements from row to row.

    Raises:
        ValueError: a row's elements are not next to each other.
    """
    if values.shape[1] > 1 and values.stride(1) != 1:
        raise ValueError(f"a table has strides {values.stride()}, expected neighbours in the last dimension")
    return values.data_ptr(), values.stride(0)


def _run(function: str, problem: Structure, arguments: tuple[object, ...]) -> None:
    name = f"cllip_{function}"
    pointers = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    chosen = INSTRUCTION_SETS.index(instruction_set())
    error = getattr(_library(), name)(byref(problem), *pointers, chosen, torch.get_num_threads())
    if error:
        raise RuntimeError(f"{name} failed: {_ERRORS.get(error, error)}")


def _accumulator(values: Tensor | None) -> int | None:
    return None if values is None or not values.numel() else values.data_ptr()


def _exclusions(block: Block, held: list[Tensor]) -> _Exclusions:
    """A block's exclusions as the library takes them; `held` keeps alive what they point to."""
    ids = (block.row_ids, block.column_ids)
    if ids[0] is None or ids[1] is None:
        ids = (None, None)
    fields: dict[str, Tensor | None] = {
        "row_ids": None if ids[0] is None else ids[0].long().contiguous(),
        "column_ids": None if ids[1] is None else ids[1].long().contiguous(),
        "row_valid": None if block.row_valid is None else block.row_valid.contiguous(),
        "column_valid": None if block.column_valid is None else block.column_valid.contiguous(),
    }
    stride = screen = 0
    if block.row_texts is not None:
        texts = _last_contiguous(block.row_texts)
        width = texts.shape[1]
        stride, screen = texts.stride(0), width // SCREENED if width >= SCREENED_FROM else width
        fields["row_texts"] = texts
    held += [each for each in fields.values() if each is not None]
    row, column, length = block.positive
    return _Exclusions(
        **{name: None if each is None else each.data_ptr() for name, each in fields.items()},
        row_text_stride=stride,
        screen=screen,
        threshold=block.threshold,
        positive_row=row,
        positive_column=column,
        positive_length=length,
    )


def _last_contiguous(features: Tensor) -> Tensor:
    return features if features.stride(-1) == 1 else features.contiguous()


def _library() -> ctypes.CDLL:
    check_available()
    return _load(LIBRARY)


@functools.cache
def _load(path: Path) -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    if not path.exists():
        return f"no {path.name} in {path.parent}: `pip install` builds it where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
        version = library.cllip_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return f"{path} has interface version {version}, this package needs {ABI_VERSION}: install it again"
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = (*arguments, c_int, c_int)
    library.cllip_apply.argtypes = (c_void_p, c_int64, c_int, c_int)
    return library
