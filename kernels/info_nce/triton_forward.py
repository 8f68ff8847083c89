"""InfoNCE forward in Triton: one product; running (reference, sum) of rows and columns in one pass.

    Σ_j e^{s_ij} = total_i · e^{reference_i}

A program owns a tile of rows and walks over columns, all of them or a part, with its rows' statistics in registers. Its
columns' go to `column_partials`, one line a row tile; a second kernel, `merge`, joins such lines. No atomics: the same
input gives the same bits.

One exponential serves row and column: e^{s − R}, R in the middle of the tile's row maxima. It is exact as long as no
score exceeds R by more than `SPREAD` and no row's or column's sum is below e^−SPREAD, for what underflows then is
below e^{SPREAD − 87} of that sum. The rare tile that breaks this is computed again, with two exponentials a score
relative to the rows' and columns' own maxima, so that nothing has to be kept for it: exact for any finite scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.block import Block
from cllip_fast.kernels.info_nce import triton_tiles as tiles
from cllip_fast.kernels.info_nce.triton_tiles import (
    Config,
    has_positives,
    is_positive,
    is_real,
    largest,
    score_tile,
    smallest,
)
from cllip_fast.kernels.tuning import LARGE, SMALL, CompileCase, Table, choose, processors

FLOOR: tl.constexpr = tl.constexpr(-1e30)
"""Reference of a sum that is 0: below that of any other; finite, so that FLOOR − FLOOR is 0."""

SPREAD: tl.constexpr = tl.constexpr(40.0)
LEAST: tl.constexpr = tl.constexpr(math.exp(-40.0))
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=tiles.NOT_SPECIALISED)
def info_nce_forward(
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
    positive,
    row_partials,
    column_partials,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (row tiles, parts of the columns). Partials [2, parts or row tiles, n or m]: references, sums."""
    strip, part, strips, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    row = start + strip * ROWS
    i = row + tl.arange(0, ROWS)
    row_reference = tl.full((ROWS,), FLOOR, tl.float32)
    row_total = tl.zeros((ROWS,), tl.float32)
    tiles_in_part = tl.cdiv(tl.cdiv(m, COLUMNS), parts)
    begin = part * tiles_in_part * COLUMNS
    for column in range(begin, min(begin + tiles_in_part * COLUMNS, m), COLUMNS):
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
        if has_positives(row, column, first, last, shift, ROWS, COLUMNS):
            here = is_positive(i, j, first, last, shift)
            inside = (i >= first) & (i < last) & (i + shift >= column) & (i + shift < column + COLUMNS)
            tl.store(positive + i, tl.sum(tl.where(here, scores, 0.0), 1), mask=inside)
        row_max = tl.max(scores, 1)
        high = largest(row_max)
        low = smallest(tl.where(row_max == -INF, INF, row_max))
        reference = tl.where(high == -INF, 0.0, 0.5 * (high + low))
        exponentials = tl.exp(scores - reference)
        tile_total = tl.sum(exponentials, 1)
        column_total = tl.sum(exponentials, 0)
        tile_reference = tl.zeros((ROWS,), tl.float32) + reference
        column_reference = tl.zeros((COLUMNS,), tl.float32) + reference
        least = smallest(tl.where(is_real(j, m, column_valid), column_total, 1.0))
        if (high > -INF) & ((high - reference > SPREAD) | (least < LEAST)):
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
            tile_reference = tl.max(scores, 1)
            tile_reference = tl.where(tile_reference == -INF, 0.0, tile_reference)
            tile_total = tl.sum(tl.exp(scores - tile_reference[:, None]), 1)
            column_reference = tl.max(scores, 0)
            column_reference = tl.where(column_reference == -INF, 0.0, column_reference)
            column_total = tl.sum(tl.exp(scores - column_reference[None, :]), 0)
        tile_reference = tl.where(tile_total == 0, FLOOR, tile_reference)
        both = tl.maximum(row_reference, tile_reference)
        row_total = row_total * tl.exp(row_reference - both) + tile_total * tl.exp(tile_reference - both)
        row_reference = both
        line = column_partials + strip.to(tl.int64) * m + j
        tl.store(line, column_reference, mask=j < m)
        tl.store(line + strips.to(tl.int64) * m, column_total, mask=j < m)
    count = n - start
    line = row_partials + part.to(tl.int64) * count + i - start
    tl.store(line, row_reference, mask=i < n)
    tl.store(line + parts.to(tl.int64) * count, row_total, mask=i < n)


@triton.jit(do_not_specialize=["parts"])  # it is often 1, which would be no tensor, but an int
def merge(partials, maximum, total, parts, size, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Join partials [2, parts, size] into (maximum, total) [size]; a total of 0 is an empty sum.

    What comes out is settled: maximum is the log-sum-exp up to a rounding that `total`, close to 1, makes up for.
    """
    j = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = j < size
    running = tl.load(total + j, mask=inside, other=0.0)
    reference = tl.where(running == 0, FLOOR, tl.load(maximum + j, mask=inside, other=0.0))
    for part in range(0, parts, PARTS):
        p = part + tl.arange(0, PARTS)
        line = partials + p.to(tl.int64)[:, None] * size + j[None, :]
        known = (p < parts)[:, None] & inside[None, :]
        sums = tl.load(line + parts.to(tl.int64) * size, mask=known, other=0.0)
        references = tl.where(sums == 0, FLOOR, tl.load(line, mask=known, other=0.0))
        top = tl.maximum(reference, tl.max(references, 0))
        running = running * tl.exp(reference - top) + tl.sum(sums * tl.exp(references - top[None, :]), 0)
        reference = top
    settled = tl.where(running == 0, 0.0, reference + tl.log(tl.where(running == 0, 1.0, running)))
    tl.store(maximum + j, settled, mask=inside)
    tl.store(total + j, running * tl.exp(tl.where(running == 0, 0.0, reference - settled)), mask=inside)


TUNING = Table(
    "info_nce forward",
    tiles.INTERPRETED
    | {
        (80, LARGE, tiles.HALF): Config(128, 128, 32, 8, 4),
        (80, LARGE, tiles.HALF_PADDED): Config(128, 128, 32, 8, 4),
        (80, LARGE, tiles.HALF_MASKED): Config(128, 64, 32, 8, 3),
        (80, LARGE, tiles.FULL): Config(64, 32, 16, 4, 3),
        (80, SMALL, tiles.HALF): Config(64, 64, 32, 8, 4),
        (80, SMALL, tiles.HALF_PADDED): Config(64, 64, 32, 8, 4),
        (80, SMALL, tiles.HALF_MASKED): Config(64, 64, 32, 8, 4),
        (90, LARGE, tiles.HALF): Config(256, 128, 64, 8, 3, tma=True),
        (90, LARGE, tiles.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, tiles.HALF_MASKED): Config(128, 64, 64, 8, 3, tma=True),
        (90, LARGE, tiles.FULL): Config(64, 64, 16, 8, 3),
        (90, SMALL, tiles.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, tiles.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, tiles.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
        (100, LARGE, tiles.HALF): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, tiles.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, tiles.HALF_MASKED): Config(128, 64, 64, 8, 3, tma=True),
        (100, LARGE, tiles.FULL): Config(64, 32, 16, 4, 3),
        (100, SMALL, tiles.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, tiles.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, tiles.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
    },
    tiles.candidates(),
)
WAVES = 2
"""Programs for each multiprocessor, at least, as long as there are column tiles to share out."""

MERGED = {"PARTS": 32, "SIZE": 32}


def forward(
    rows: Tensor, columns: Tensor, scale: Tensor, block: Block, maximum: Tensor, total: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch both kernels; see `tiles.forward_block`.

    Args:
        maximum, total, positive: [n] fp32, running statistics of the rows, updated in place.

    Returns:
        maximum [m], total [m] of the columns.
    """
    n, m = rows.shape[0], columns.shape[0]
    column_max, column_total = scale.new_zeros((2, m)).unbind()
    if not n or not m:
        return column_max, column_total

    def launch(config: Config) -> tuple[Tensor, Tensor]:
        strips, column_tiles = triton.cdiv(n, config.rows), triton.cdiv(m, config.columns)
        parts = min(column_tiles, triton.cdiv(WAVES * processors(rows.device), strips))
        partials = scale.new_empty((2, parts, n)), scale.new_empty((2, strips, m))
        info_nce_forward[strips, parts](
            **tiles.pair_arguments(rows, columns, scale, block, config),
            start=0,
            n=n,
            positive=positive,
            row_partials=partials[0],
            column_partials=partials[1],
            **config.options(),
        )
        return partials

    kind = tiles.kind_of(rows.dtype, block)
    row_partials, column_partials = launch(choose(TUNING, kind, rows.device, tiles.programs(rows, columns), launch))
    parts, strips = row_partials.shape[1], column_partials.shape[1]
    merge[(triton.cdiv(n, MERGED["SIZE"]),)](row_partials, maximum, total, parts, n, **MERGED)
    merge[(triton.cdiv(m, MERGED["SIZE"]),)](column_partials, column_max, column_total, strips, m, **MERGED)
    return column_max, column_total


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration of sm_`capability`, for compilation ahead of time; D is no constant."""
    signature = dict.fromkeys(("positive", "row_partials", "column_partials"), "*fp32")
    yield from tiles.pair_cases("info_nce forward", info_nce_forward, TUNING.at(capability), signature, {})
    merged = {"partials": "*fp32", "maximum": "*fp32", "total": "*fp32", "parts": "i32", "size": "i32"}
    yield CompileCase("info_nce merge", merge, merged, MERGED, ("partials", "maximum", "total", "size"), 4, 3)
