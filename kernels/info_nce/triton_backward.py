"""InfoNCE backward in Triton: the chunk's gradient tile, written for two library products; or all of it fused.

    G_ij = r_i e^{s_ij − row_lse_i} + c_j e^{s_ij − col_lse_j} − [i = j] (r_i + c_j)
    d_rows += G · y        d_columns += Gᵀ · x

`write_gradient` computes the scores again and stores G in the features' type, in pieces of rows small enough to stay in
the L2, where the products find them: three products in all. `fused_gradient` keeps G in registers and multiplies at
once; it runs once for the rows and, with the two sides exchanged, once for the columns: four products up to a width of
128, and two more for each further 128. docs/kernels_info_nce.md compares them.

One exponential e^{s − R} serves row and column where all the tile's maxima lie within 2 · SPREAD of each other, two
otherwise: exact for any finite scores. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.block import Block
from cllip_fast.kernels.info_nce import triton_tiles as tiles
from cllip_fast.kernels.info_nce.triton_tiles import (
    Config,
    has_positives,
    is_positive,
    largest,
    load_tile,
    score_tile,
    smallest,
)
from cllip_fast.kernels.products import accumulate
from cllip_fast.kernels.tuning import LARGE, SMALL, CompileCase, Table, choose

SPREAD: tl.constexpr = tl.constexpr(30.0)
INF: tl.constexpr = tl.constexpr(float("inf"))

FUSED_WIDTH = 0
"""Features up to this width go the fused way. 0: none do, as docs/kernels_info_nce.md predicts to be best."""


@triton.jit
def load_values(values, index, count, stride):
    """maximum, factor, weight [size] of one side's [3, stride]; 0 outside."""
    inside = index < count
    maximum = tl.load(values + index, mask=inside, other=0.0)
    factor = tl.load(values + stride + index, mask=inside, other=0.0)
    return maximum, factor, tl.load(values + 2 * stride + index, mask=inside, other=0.0)


@triton.jit
def joint_gradient(scores, row_max, row_factor, column_max, column_factor):
    """[ROWS, COLUMNS] row_factor e^{s − row_max} + column_factor e^{s − column_max}."""
    # A row or column that is (0, 0) has no pair: it must not decide.
    row_known = (row_factor != 0) | (row_max != 0)
    column_known = (column_factor != 0) | (column_max != 0)
    high = tl.maximum(largest(tl.where(row_known, row_max, -INF)), largest(tl.where(column_known, column_max, -INF)))
    low = tl.minimum(smallest(tl.where(row_known, row_max, INF)), smallest(tl.where(column_known, column_max, INF)))
    if (high >= low) & (high - low <= 2 * SPREAD):
        reference = 0.5 * (high + low)
        by_row = tl.where(row_known, row_factor * tl.exp(reference - row_max), 0.0)
        by_column = tl.where(column_known, column_factor * tl.exp(reference - column_max), 0.0)
        gradient = tl.exp(scores - reference) * (by_row[:, None] + by_column[None, :])
    else:
        gradient = tl.exp(scores - row_max[:, None]) * row_factor[:, None]
        gradient += tl.exp(scores - column_max[None, :]) * column_factor[None, :]
    return gradient


@triton.jit(do_not_specialize=tiles.NOT_SPECIALISED)
def write_gradient(
    rows,
    columns,
    scale,
    start,
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
    row_values,
    column_values,
    row_count,
    gradient,
    column_gradient,
    gradient_stride,
    row_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program a tile: rows start … n of G into `gradient` [n − start, gradient_stride].

    row_values [3, row_count], column_values [3, m]: see `tiles.backward_block`. With `column_gradient`, the row
    softmax's part goes to `gradient`, the column softmax's there. `row_part` [row tiles, m] or None: Σ_i row part · s.
    """
    column_tiles = tl.cdiv(m, COLUMNS)
    strip = tl.program_id(0) // column_tiles
    row = start + strip * ROWS
    column = tl.program_id(0) % column_tiles * COLUMNS
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    scores = score_tile(
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
        ROWS,
        COLUMNS,
        DEPTH,
        TMA,
    )
    row_max, row_factor, row_weight = load_values(row_values, i, n, row_count)
    column_max, column_factor, column_weight = load_values(column_values, j, m, m)
    inside = (i < n)[:, None] & (j < m)[None, :]
    offset = (i - start).to(tl.int64)[:, None] * gradient_stride + j[None, :]
    if column_gradient is None and row_part is None:
        result = joint_gradient(scores, row_max, row_factor, column_max, column_factor)
        if has_positives(row, column, first, last, shift, ROWS, COLUMNS):
            here = is_positive(i, j, first, last, shift)
            result = tl.where(here, result - (row_weight[:, None] + column_weight[None, :]), result)
    else:
        here = is_positive(i, j, first, last, shift)
        result = tl.exp(scores - row_max[:, None]) * row_factor[:, None]
        result = tl.where(here, result - row_weight[:, None], result)
        if row_part is not None:
            part = tl.sum(tl.where(scores == -INF, 0.0, result * scores), 0)
            tl.store(row_part + strip.to(tl.int64) * m + j, part, mask=j < m)
        by_column = tl.exp(scores - column_max[None, :]) * column_factor[None, :]
        by_column = tl.where(here, by_column - column_weight[None, :], by_column)
        if column_gradient is None:
            result += by_column
        else:
            tl.store(column_gradient + offset, by_column.to(column_gradient.dtype.element_ty), mask=inside)
    tl.store(gradient + offset, result.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=tiles.NOT_SPECIALISED)
def fused_gradient(
    rows,
    columns,
    scale,
    start,
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
    row_values,
    column_values,
    features,
    feature_stride,
    d_rows,
    gradient_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (row tiles, parts of the width): d_rows [n, D] += G · features [m, D], WIDTH numbers a program.

    `features` are the columns' again. SPLIT: the row softmax's part of G only.
    """
    row, part = start + tl.program_id(0) * ROWS, tl.program_id(1) * WIDTH
    i = row + tl.arange(0, ROWS)
    d = part + tl.arange(0, WIDTH)
    row_max, row_factor, row_weight = load_values(row_values, i, n, n)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for column in range(0, m, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        scores = score_tile(
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
            ROWS,
            COLUMNS,
            DEPTH,
            TMA,
        )
        here = is_positive(i, j, first, last, shift)
        if SPLIT:
            result = tl.exp(scores - row_max[:, None]) * row_factor[:, None]
            result = tl.where(here, result - row_weight[:, None], result)
        else:
            column_max, column_factor, column_weight = load_values(column_values, j, m, m)
            result = joint_gradient(scores, row_max, row_factor, column_max, column_factor)
            result = tl.where(here, result - (row_weight[:, None] + column_weight[None, :]), result)
        y = load_tile(features, column, part, m, width, feature_stride, COLUMNS, WIDTH, False)
        total = tl.dot(result.to(y.dtype), y, total, input_precision="ieee")
    address = d_rows + i.to(tl.int64)[:, None] * gradient_stride + d[None, :]
    inside = (i < n)[:, None] & (d < width)[None, :]
    tl.store(address, tl.load(address, mask=inside, other=0.0) + total, mask=inside)


TUNING = Table(
    "info_nce gradient",
    tiles.INTERPRETED
    | {
        (80, LARGE, tiles.HALF): Config(128, 128, 32, 8, 4),
        (80, LARGE, tiles.HALF_PADDED): Config(128, 128, 32, 8, 4),
        (80, LARGE, tiles.HALF_MASKED): Config(128, 64, 32, 8, 3),
        (80, LARGE, tiles.FULL): Config(64, 64, 32, 8, 3),
        (80, SMALL, tiles.HALF): Config(64, 64, 32, 4, 4),
        (80, SMALL, tiles.HALF_PADDED): Config(64, 64, 32, 4, 4),
        (80, SMALL, tiles.HALF_MASKED): Config(64, 64, 32, 4, 4),
        (90, LARGE, tiles.HALF): Config(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, tiles.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, tiles.HALF_MASKED): Config(128, 64, 64, 8, 3, tma=True),
        (90, LARGE, tiles.FULL): Config(64, 64, 32, 8, 3),
        (90, SMALL, tiles.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, tiles.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, tiles.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
        (100, LARGE, tiles.HALF): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, tiles.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, tiles.HALF_MASKED): Config(128, 64, 32, 8, 3, tma=True),
        (100, LARGE, tiles.FULL): Config(64, 64, 32, 8, 3),
        (100, SMALL, tiles.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, tiles.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, tiles.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
    },
    tiles.candidates(),
)
"""Of `write_gradient`."""

FUSED_TUNING = Table(
    "info_nce fused gradient",
    {(0, LARGE, kind): Config(32, 16, 32, 4, 2) for kind in tiles.KINDS}
    | {(80, LARGE, kind): Config(64, 64, 32, 8, 2) for kind in tiles.HALF_KINDS}
    | {(90, LARGE, kind): Config(64, 64, 64, 8, 3) for kind in tiles.HALF_KINDS}
    | {(100, LARGE, kind): Config(64, 64, 64, 8, 3) for kind in tiles.HALF_KINDS}
    | {
        (80, LARGE, tiles.FULL): Config(32, 32, 16, 8, 2),
        (90, LARGE, tiles.FULL): Config(32, 32, 16, 4, 2),
        (100, LARGE, tiles.FULL): Config(32, 16, 16, 4, 2),
    },
)
"""Of `fused_gradient`."""

FUSED_BLOCK = {0: 16, 80: 128, 90: 128, 100: 128}
"""WIDTH of `fused_gradient`, at most."""


def by_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    block: Block,
    row_values: Tensor,
    column_values: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    split: bool,
    row_part: Tensor | None,
) -> None:
    """G piece by piece, each with two library products; see `tiles.backward_block`."""
    n, m = rows.shape[0], columns.shape[0]
    kind = tiles.kind_of(rows.dtype, block)
    if kind != tiles.FULL and (split or row_part is not None):
        kind = tiles.HALF_MASKED  # two tiles of gradients: as many registers

    @functools.cache
    def arguments(config: Config) -> dict[str, Any]:
        return tiles.pair_arguments(rows, columns, scale, block, config)

    def launch(config: Config, start: int, height: int, room: Tensor, column_room: Tensor | None) -> Tensor | None:
        """Rows start … start + height of G, at most; the row part, one line a row tile."""
        stop = min(n, start + height)
        strips = triton.cdiv(stop - start, config.rows)
        parts = None if row_part is None else scale.new_empty((strips, m))
        write_gradient[(strips * triton.cdiv(m, config.columns),)](
            **arguments(config),
            start=start,
            n=stop,
            row_values=row_values,
            column_values=column_values,
            row_count=n,
            gradient=room,
            column_gradient=column_room,
            gradient_stride=room.stride(0),
            row_part=parts,
            **config.options(),
        )
        return parts

    def first_piece(config: Config) -> None:
        height, room = tiles.gradient_room(rows, m, config.rows)
        launch(config, 0, height, room, torch.empty_like(room) if split else None)

    config = choose(TUNING, kind, rows.device, tiles.programs(rows, columns), first_piece)
    height, room = tiles.gradient_room(rows, m, config.rows)
    column_room = torch.empty_like(room) if split else None
    for start in range(0, n, height):
        stop = min(n, start + height)
        parts = launch(config, start, height, room, column_room)
        if parts is not None:
            row_part += parts.sum(0)
        by_row, by_column = (each[: stop - start, :m] for each in (room, column_room if split else room))
        if d_rows.numel():
            accumulate(d_rows[start:stop], by_row, columns)
        if d_columns.numel():
            accumulate(d_columns, by_column.t(), rows[start:stop])


def fused(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    block: Block,
    row_values: Tensor,
    column_values: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    split: bool,
) -> None:
    """Nothing but registers for G; see `tiles.backward_block`."""
    config = choose(FUSED_TUNING, tiles.kind_of(rows.dtype, block), rows.device, tiles.programs(rows, columns))
    width = min(triton.next_power_of_2(rows.shape[1]), tiles.of_device(FUSED_BLOCK, rows.device))
    rows, columns = tiles.dense_rows(rows), tiles.dense_rows(columns)
    arguments = tiles.pair_arguments(rows, columns, scale, block, config)
    for own, other, own_values, other_values, d_own in (
        (rows, columns, row_values, column_values, d_rows),
        (columns, rows, column_values, row_values, d_columns),
    ):
        if d_own.numel():
            fused_gradient[triton.cdiv(own.shape[0], config.rows), triton.cdiv(own.shape[1], width)](
                **arguments,
                start=0,
                n=own.shape[0],
                row_values=own_values,
                column_values=other_values,
                features=other,
                feature_stride=other.stride(0),
                d_rows=d_own,
                gradient_stride=d_own.stride(0),
                SPLIT=split,
                WIDTH=max(16, width),
                **config.options(),
            )
        arguments = tiles.exchanged(arguments, rows.shape[0])


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration of sm_`capability`, for compilation ahead of time."""
    values = {"row_values": "*fp32", "column_values": "*fp32"}
    written = values | {"row_count": "i32", "gradient": "*features", "gradient_stride": "i32"}
    table = TUNING.at(capability)
    two = {(LARGE, kind): table[LARGE, kind if kind == tiles.FULL else tiles.HALF_MASKED] for kind in tiles.KINDS}
    apart: dict[str, Any]
    for name, configs, more, apart in (
        ("", table, {}, {"column_gradient": None, "row_part": None}),
        (" split", two, {"column_gradient": "*features"}, {"row_part": None}),
        (" with row part", two, {"row_part": "*fp32"}, {"column_gradient": None}),
    ):
        yield from tiles.pair_cases(f"info_nce gradient{name}", write_gradient, configs, written | more, apart)
    fused = values | {"features": "*features", "feature_stride": "i32", "d_rows": "*fp32", "gradient_stride": "i32"}
    for width in (64, FUSED_BLOCK[capability]):
        constants = {"SPLIT": False, "WIDTH": width}
        name = f"info_nce fused gradient D{width}"
        yield from tiles.pair_cases(name, fused_gradient, FUSED_TUNING.at(capability), fused, constants)
