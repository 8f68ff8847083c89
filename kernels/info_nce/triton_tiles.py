"""One tile of scores in Triton, with its exclusions, and what the launchers of such kernels have in common.

A kernel's leading arguments are two sides and what pairs them, always under the same names:

    rows, columns     [n, D], [m, D] pointers, or host-made tensor descriptors (TMA) whose blocks are the tile's
    scale             [] fp32 in memory: nothing is read on the host
    start, n          the first and the last row + 1 to work on; m columns; `width` is D
    first, last, shift    row i in first … last has its positive in column i + shift
    *_valid, *_ids, *_texts, row_limits, column_lengths    masks as in `Block`, or None
    ROWS, COLUMNS, DEPTH, TMA    the tile, how much of D at a time, and whether it is loaded by descriptors

Products accumulate in fp32. fp32 features are multiplied in fp32 ("ieee"), not in TF32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cllip_fast.errors import InputError
from cllip_fast.kernels.block import Block, lengths
from cllip_fast.kernels.tuning import LARGE, SMALL, CompileCase, capability_of


@triton.jit
def load_tile(source, first, k, count, width, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, DEPTH] of `source` [count, width] from (first, k) on; 0 outside."""
    if TMA:
        return source.load([first, k])
    else:
        i = first + tl.arange(0, ROWS)
        d = k + tl.arange(0, DEPTH)
        address = source + i.to(tl.int64)[:, None] * stride + d[None, :]
        return tl.load(address, mask=(i < count)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def product(
    left,
    right,
    row,
    column,
    n,
    m,
    width,
    left_stride,
    right_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] fp32: left [n, D] · right [m, D]ᵀ from (row, column) on."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, DEPTH):
        x = load_tile(left, row, k, n, width, left_stride, ROWS, DEPTH, TMA)
        y = load_tile(right, column, k, m, width, right_stride, COLUMNS, DEPTH, TMA)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit
def largest(x):
    """Scalar maximum of [size ≥ 4] that is itself a reduction's result.

    The new shape is for sm_100: Triton 3.7 cannot compile a reduction of a reduction of a product there.
    """
    return tl.max(tl.reshape(x, (2, x.shape[0] // 2)))


@triton.jit
def smallest(x):
    """Scalar minimum; see `largest`."""
    return tl.min(tl.reshape(x, (2, x.shape[0] // 2)))


@triton.jit
def is_positive(i, j, first, last, shift):
    """[ROWS, COLUMNS] bool: which pairs are positives."""
    return (j[None, :] - i[:, None] == shift) & ((i >= first) & (i < last))[:, None]


@triton.jit
def has_positives(row, column, first, last, shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether the tile may have any."""
    crossed = (column < row + ROWS + shift) & (row + shift < column + COLUMNS)
    return crossed & (row < last) & (first < row + ROWS)


@triton.jit
def is_real(index, count, valid):
    """[size] bool: inside, and no padding."""
    real = index < count
    if valid is not None:
        real = real & (tl.load(valid + index, mask=real, other=0) != 0)
    return real


@triton.jit
def score_tile(
    rows,
    columns,
    scale,
    row,
    column,
    n,
    m,
    width,
    row_stride,
    column_stride,
    first,
    last,
    shift,
    row_valid,
    column_valid,
    row_ids,
    column_ids,
    row_texts,
    column_texts,
    row_text_stride,
    column_text_stride,
    row_limits,
    column_lengths,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] scores from (row, column) on; −∞ where a pair is excluded or outside."""
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    scores = product(
        rows, columns, row, column, n, m, width, row_stride, column_stride, ROWS, COLUMNS, DEPTH, TMA
    ) * tl.load(scale)
    if row_texts is not None:
        cosines = product(
            row_texts,
            column_texts,
            row,
            column,
            n,
            m,
            width,
            row_text_stride,
            column_text_stride,
            ROWS,
            COLUMNS,
            DEPTH,
            TMA,
        )
        limit = tl.load(row_limits + i, mask=i < n, other=0.0)
        length = tl.load(column_lengths + j, mask=j < m, other=0.0)
        if has_positives(row, column, first, last, shift, ROWS, COLUMNS):
            cosines = tl.where(is_positive(i, j, first, last, shift), float("-inf"), cosines)
        scores = tl.where(cosines > limit[:, None] * length[None, :], float("-inf"), scores)
    if row_ids is not None:
        of_row, of_column = tl.load(row_ids + i, mask=i < n, other=0), tl.load(column_ids + j, mask=j < m, other=0)
        if has_positives(row, column, first, last, shift, ROWS, COLUMNS):
            same = (of_row[:, None] == of_column[None, :]) & ~is_positive(i, j, first, last, shift)
            scores = tl.where(same, float("-inf"), scores)
        else:
            scores = tl.where(of_row[:, None] == of_column[None, :], float("-inf"), scores)
    real = is_real(i, n, row_valid)[:, None] & is_real(j, m, column_valid)[None, :]
    return tl.where(real, scores, float("-inf"))


class Config(NamedTuple):
    """One row of a tuning table: the tile, launch options, and whether tiles are loaded by TMA where they can be."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False

    def tile(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


Row = TypeVar("Row")
KINDS = HALF, HALF_PADDED, HALF_MASKED, FULL = "half", "half padded", "half masked", "full"
"""Kinds of tiles, see `kind_of`."""
HALF_KINDS = HALF, HALF_PADDED, HALF_MASKED

INTERPRETED = {
    (0, LARGE, HALF): Config(32, 16, 32, 4, 2, tma=True),
    (0, LARGE, HALF_PADDED): Config(16, 32, 32, 4, 2),
    (0, LARGE, HALF_MASKED): Config(16, 32, 32, 4, 2),
    (0, LARGE, FULL): Config(16, 32, 32, 4, 2),
}
"""Rows for the interpreter: small tiles, to have many of them."""


def candidates() -> dict[tuple[int, str], tuple[Config, ...]]:
    """What CLLIP_AUTOTUNE=1 tries: from 64 × 64 for small problems to what `triton_forward` has for large ones."""
    found: dict[tuple[int, str], tuple[Config, ...]] = {}
    for capability, depth, tma in ((80, 32, False), (90, 64, True), (100, 64, True)):
        half = (
            Config(128, 128, depth, 8, 3, tma),
            Config(128, 128, depth, 8, 4, tma),
            Config(128, 64, depth, 8, 3, tma),
            Config(128, 64, depth, 4, 4, tma),
            Config(64, 128, depth, 4, 4, tma),
            Config(64, 64, depth, 4, 4, tma),
        )
        found |= {(capability, kind): half for kind in (HALF_PADDED, HALF_MASKED)}
        found[capability, HALF] = (Config(256, 128, depth, 8, 3, tma), *half)
        found[capability, FULL] = (Config(64, 64, 16, 8, 3), Config(64, 32, 16, 4, 3), Config(32, 32, 32, 4, 3))
    return found


def kind_of(dtype: torch.dtype, block: Block) -> str:
    """fp32, or half precision: plain, with padding, with ids or conflict filter. More masks, more registers a score."""
    if dtype == torch.float32:
        return FULL
    if block.row_texts is not None or block.row_ids is not None:
        return HALF_MASKED
    return HALF if block.row_valid is None and block.column_valid is None else HALF_PADDED


def of_device(table: Mapping[int, Row], device: torch.device) -> Row:
    """The row of the device's capability, or the nearest lower one."""
    return table[max(each for each in table if each <= capability_of(device))]


def runs(features: Tensor) -> bool:
    """Whether these kernels take the features: True; False for fp64, which `tiles.py` computes.

    Raises:
        InputError: the features are neither on a GPU nor in Triton's interpreter.
    """
    if not features.is_cuda and not triton.knobs.runtime.interpret:
        raise InputError(f"backend is 'triton', which runs on GPUs only, but the features are on {features.device}")
    return features.dtype != torch.float64


def pair_arguments(rows: Tensor, columns: Tensor, scale: Tensor, block: Block, config: Config) -> dict[str, Any]:
    """The leading arguments of a kernel, all but start, n."""
    rows, columns = dense_rows(rows), dense_rows(columns)
    row, column, length = block.positive
    by_ids = block.row_ids is not None and block.column_ids is not None
    filtered = block.row_texts is not None
    texts = dense_rows(block.row_texts) if filtered else None
    tma = config.tma and all(_has_descriptor(each) for each in (rows, columns, texts) if each is not None)

    def operand(features: Tensor, height: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(features, [height, config.depth]) if tma else features

    return {
        "rows": operand(rows, config.rows),
        "columns": operand(columns, config.columns),
        "scale": scale,
        "m": columns.shape[0],
        "width": columns.shape[1],
        "row_stride": rows.stride(0),
        "column_stride": columns.stride(0),
        "first": row,
        "last": row + length,
        "shift": column - row,
        "row_valid": side_by_side(block.row_valid),
        "column_valid": side_by_side(block.column_valid),
        "row_ids": side_by_side(block.row_ids) if by_ids else None,
        "column_ids": side_by_side(block.column_ids) if by_ids else None,
        "row_texts": operand(texts, config.rows) if filtered else None,
        "column_texts": operand(columns, config.columns) if filtered else None,
        "row_text_stride": texts.stride(0) if filtered else None,
        "column_text_stride": columns.stride(0) if filtered else None,
        "row_limits": lengths(texts) * block.threshold if filtered else None,
        "column_lengths": lengths(columns) if filtered else None,
        **config.tile(),
        "TMA": tma,
    }


def exchanged(arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    """The arguments of `pair_arguments`, without descriptors, with the sides' parts exchanged; `rows` is n."""
    sides = ("s", "_stride", "_valid", "_ids", "_texts", "_text_stride")
    names = [(f"row{each}", f"column{each}") for each in sides] + [("row_limits", "column_lengths")]
    swapped = {one: arguments[other] for pair in names for one, other in (pair, pair[::-1])}
    shift = arguments["shift"]
    run = {"first": arguments["first"] + shift, "last": arguments["last"] + shift, "shift": -shift}
    return arguments | swapped | run | {"m": rows}


def programs(rows: Tensor, columns: Tensor) -> Callable[[Config], int]:
    """Configuration -> tiles of [n, m] scores."""
    return lambda config: triton.cdiv(rows.shape[0], config.rows) * triton.cdiv(columns.shape[0], config.columns)


def dense_rows(features: Tensor) -> Tensor:
    """Features with stride 1 in their last dimension."""
    return features if features.stride(1) == 1 else features.contiguous()


def side_by_side(mask: Tensor | None) -> Tensor | None:
    """A mask or ids [n] with stride 1, which the kernels take for granted."""
    return None if mask is None else mask.contiguous()


def _has_descriptor(features: Tensor) -> bool:
    aligned = features.data_ptr() % 16 == 0 and features.stride(0) * features.element_size() % 16 == 0
    return aligned and features.numel() > 0 and features.stride(0) >= features.shape[1]  # rows apart, none repeated


PIECE_BYTES = 32 * 2**20
"""Of a piece of a gradient tile, at most, unless a row of tiles has more: with its operands it fits an L2 of 50 MB."""


def gradient_room(rows: Tensor, m: int, tile_rows: int) -> tuple[int, Tensor]:
    """Rows in a piece, a multiple of `tile_rows` or all, and room for its gradient [rows, m or a bit more]."""
    stride = triton.cdiv(m, 16) * 16  # aligned rows, for the stores and for the products
    strips = max(1, PIECE_BYTES // (stride * rows.element_size() * tile_rows))
    height = min(rows.shape[0], strips * tile_rows)
    return height, rows.new_empty((height, stride))


TYPES = ("bf16", "fp16", "fp32")
"""Triton's names of the features' types."""

# What a launch finds divisible by 16 in ordinary sizes, and what it does not look at.
DIVISIBLE = ("m", "width", "row_stride", "column_stride", "row_text_stride", "column_text_stride")
NOT_SPECIALISED = ("start", "n", "first", "last", "shift")


def pair_cases(
    name: str,
    kernel: Any,
    configs: Mapping[tuple[str, str], Config],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
) -> Iterator[CompileCase]:
    """A kernel with leading arguments, for compilation ahead of time: every type, without and with masks.

    Args:
        name: begins the cases' names.
        configs: (size class, kind) -> configuration; those of the small class are compiled with no mask and with all.
        signature, constants: of the arguments after the leading ones; "features" is the type of the features.
    """
    masked = (), ("padded",), ("padded", "filtered"), ("padded", "ids", "filtered")
    for size, sets in ((LARGE, masked), (SMALL, (masked[0], masked[-1]))):
        for dtype, masks in itertools.product(TYPES, sets):
            kind = FULL if dtype == "fp32" else HALF_MASKED if "filtered" in masks else HALF_PADDED if masks else HALF
            config = configs.get((size, kind))
            if config is not None:
                called = name if size == LARGE else f"{name} {size}"
                yield _pair_case(called, kernel, dtype, config, signature, constants, masks)


def _pair_case(
    name: str,
    kernel: Any,
    dtype: str,
    config: Config,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    masks: tuple[str, ...],
) -> CompileCase:
    def operand(height: int) -> str:
        return f"tensordesc<{dtype}[{height},{config.depth}]>" if config.tma else f"*{dtype}"

    arguments = {"rows": operand(config.rows), "columns": operand(config.columns), "scale": "*fp32"}
    arguments |= dict.fromkeys(("start", "n", "m", "width", "row_stride", "column_stride"), "i32")
    arguments |= dict.fromkeys(("first", "last", "shift"), "i32")
    optional = {
        "padded": {"row_valid": "*i1", "column_valid": "*i1"},
        "ids": {"row_ids": "*i64", "column_ids": "*i64"},
        "filtered": {"row_texts": operand(config.rows), "column_texts": operand(config.columns)}
        | {"row_text_stride": "i32", "column_text_stride": "i32", "row_limits": "*fp32", "column_lengths": "*fp32"},
    }
    absent: dict[str, Any] = {}
    for mask, group in optional.items():
        arguments |= group if mask in masks else {}
        absent |= {} if mask in masks else dict.fromkeys(group)
    arguments |= {each: kind.replace("features", dtype) for each, kind in signature.items()}
    pointers = [each for each, kind in arguments.items() if kind.startswith("*")]
    return CompileCase(
        name=" ".join((name, dtype, *masks)),
        kernel=kernel,
        signature=arguments,
        constants=absent | config.tile() | {"TMA": config.tma} | dict(constants),
        divisible_by_16=(*pointers, *(each for each in DIVISIBLE if each in arguments)),
        **config.options(),
    )
