"""The native CPU kernels: finds the library that `kernels/csrc` is built into, and calls it on tiles.

The product of a tile stays with PyTorch; the library does what comes after it (exclusions, exponentials, sums, the
gradient) in one pass over memory, for fp32. Nothing is loaded before the first call. The environment variable
CLLIP_INSTRUCTION_SET chooses among "avx512", "avx2" and "portable"; unset, it is the best one that the CPU has.
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
from cllip_fast.kernels.block import Block, Workspace

LIBRARY = Path(__file__).with_name("libcllip_native.so")
ABI_VERSION = 1
"""CLLIP_ABI_VERSION of `csrc/cllip_native.h`."""

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""In the order of the header's enumeration: the later, the faster."""

INSTRUCTION_SET_VARIABLE = "CLLIP_INSTRUCTION_SET"


class _Tile(Structure):
    _fields_ = (("data", c_void_p), ("rows", c_int64), ("columns", c_int64), ("stride", c_int64))


class _Exclusions(Structure):
    _fields_ = (
        ("cosine", c_void_p),
        ("cosine_stride", c_int64),
        ("cosine_limit", c_void_p),
        ("row_ids", c_void_p),
        ("column_ids", c_void_p),
        ("row_valid", c_void_p),
        ("column_valid", c_void_p),
        ("positive_row", c_int64),
        ("positive_column", c_int64),
        ("positive_length", c_int64),
    )


_SIGNATURES = {
    "cllip_info_nce_forward": (c_void_p,) * 4,
    "cllip_info_nce_backward": (c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_int, c_void_p, c_void_p),
    "cllip_sigmoid_forward": (c_float, POINTER(c_double)),
    "cllip_sigmoid_backward": (c_float, POINTER(c_double)),
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


def call(function: str, tile: Tensor, exclusions: Exclusions, start: int, *arguments: object) -> None:
    """Run `function` of `csrc/cllip_native.h` on `tile`, whose first row is row `start` of the block, in place.

    Args:
        function: its name without the prefix "cllip_".
        arguments: what the C function takes between the exclusions and the instruction set; tensors (fp32, contiguous,
            or None) for pointers.
    """
    name = f"cllip_{function}"
    rows, columns = tile.shape
    pointers = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    shape = _Tile(tile.data_ptr(), rows, columns, tile.stride(0))
    chosen = INSTRUCTION_SETS.index(instruction_set())
    excluded = exclusions.of_rows(start, rows)
    error = getattr(_library(), name)(byref(shape), byref(excluded), *pointers, chosen, torch.get_num_threads())
    if error:
        raise RuntimeError(f"{name} failed: {_ERRORS.get(error, error)}")


class Exclusions:
    """A block's exclusions as the library takes them.

    Args:
        block: positives and exclusions of all rows.
        columns: [m, D] fp32.
        space: tile buffer 2 takes the texts' cosines.
    """

    def __init__(self, block: Block, columns: Tensor, space: Workspace) -> None:
        self._block, self._columns, self._space = block, columns, space
        both = block.row_ids is not None and block.column_ids is not None
        self._row_ids, self._column_ids = (
            (block.row_ids.long().contiguous(), block.column_ids.long().contiguous()) if both else (None, None)
        )
        self._row_valid = None if block.row_valid is None else block.row_valid.contiguous()
        self._column_valid = None if block.column_valid is None else block.column_valid.contiguous()
        # |column| on the right-hand side instead of a normalised copy of the chunk.
        self._limit = None
        if block.row_texts is not None:
            self._limit = torch.linalg.vector_norm(columns, dim=1).mul_(block.threshold)

    def of_rows(self, start: int, rows: int) -> _Exclusions:
        """For the tile of rows start … start + rows; computes its cosines. Valid until the next call."""
        row, column, length = self._block.positive
        cosines = None
        if self._limit is not None:
            cosines = self._space.tile(2, rows, len(self._columns))
            torch.mm(self._block.row_texts[start : start + rows], self._columns.t(), out=cosines)
        return _Exclusions(
            _pointer(cosines),
            len(self._columns),
            _pointer(self._limit),
            _pointer(self._row_ids, start),
            _pointer(self._column_ids),
            _pointer(self._row_valid, start),
            _pointer(self._column_valid),
            row - start,
            column,
            length,
        )


def _pointer(tensor: Tensor | None, start: int = 0) -> int | None:
    return None if tensor is None else tensor.data_ptr() + start * tensor.element_size()


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
        getattr(library, name).argtypes = (POINTER(_Tile), POINTER(_Exclusions), *arguments, c_int, c_int)
    library.cllip_apply.argtypes = (c_void_p, c_int64, c_int, c_int)
    return library
