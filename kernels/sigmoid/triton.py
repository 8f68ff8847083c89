"""Pairwise sigmoid loss on a GPU in bf16, fp16 and fp32, by Triton; fp64 is done by `tiles.py`.

With u = −z l: loss softplus(u) = max(u, 0) + log(1 + e^−|u|), gradient −z σ(u), both from one exponential. Forward is
one product. Backward is three and gives the loss too: one pass writes the gradient tile in the features' type, in
pieces of rows that stay in the L2, where two library products find them. A program does one tile and stores its sums,
which are then added: no atomics, the same input gives the same bits. No call waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import triton_tiles as shared
from cllip_fast.kernels.info_nce.triton_tiles import Config, has_positives, is_positive, score_tile
from cllip_fast.kernels.products import accumulate
from cllip_fast.kernels.sigmoid import tiles
from cllip_fast.kernels.tuning import LARGE, SMALL, CompileCase, Table, choose

__all__ = ["backward_block", "compile_cases", "forward_block"]


@triton.jit
def log1p(e):
    """log(1 + e) of e in [0, 1] by a polynomial, to a relative 2e-7; the logarithm of 1 + e would lose a small e."""
    p = 0.005253457929939032
    p = p * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    return e * (p * e + 1.0)


@triton.jit(do_not_specialize=shared.NOT_SPECIALISED)
def sigmoid_tile(
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
    bias,
    losses,
    gradient,
    gradient_stride,
    gradient_sums,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program a tile of rows start … n: its loss into `losses` [programs].

    With `gradient` [n − start, gradient_stride], also its logits' gradients there, their sum into `gradient_sums`.
    """
    column_tiles = tl.cdiv(m, COLUMNS)
    row = start + tl.program_id(0) // column_tiles * ROWS
    column = tl.program_id(0) % column_tiles * COLUMNS
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    u = score_tile(
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
    if bias is not None:
        u += tl.load(bias)
    crossed = has_positives(row, column, first, last, shift, ROWS, COLUMNS)
    if crossed:
        # An excluded positive stays at −∞, where there is neither loss nor gradient.
        u = tl.where(is_positive(i, j, first, last, shift) & (u != float("-inf")), -u, u)
    e = tl.exp(-tl.abs(u))
    loss = tl.where(u > 0, u, 0.0) + log1p(e)
    tl.store(losses + tl.program_id(0), tl.sum(loss))
    if gradient is not None:
        result = tl.where(u > 0, 1.0, e) / (1.0 + e)
        if crossed:
            result = tl.where(is_positive(i, j, first, last, shift), -result, result)
        tl.store(gradient_sums + tl.program_id(0), tl.sum(result))
        offset = (i - start).to(tl.int64)[:, None] * gradient_stride + j[None, :]
        inside = (i < n)[:, None] & (j < m)[None, :]
        tl.store(gradient + offset, result.to(gradient.dtype.element_ty), mask=inside)


TUNING = Table(
    "sigmoid",
    shared.INTERPRETED
    | {
        (80, LARGE, shared.HALF): Config(128, 128, 32, 8, 4),
        (80, LARGE, shared.HALF_PADDED): Config(128, 128, 32, 8, 4),
        (80, LARGE, shared.HALF_MASKED): Config(128, 64, 32, 8, 3),
        (80, LARGE, shared.FULL): Config(64, 64, 32, 8, 3),
        (80, SMALL, shared.HALF): Config(64, 64, 32, 4, 4),
        (80, SMALL, shared.HALF_PADDED): Config(64, 64, 32, 4, 4),
        (80, SMALL, shared.HALF_MASKED): Config(64, 64, 32, 4, 4),
        (90, LARGE, shared.HALF): Config(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, shared.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, shared.HALF_MASKED): Config(128, 64, 64, 8, 3, tma=True),
        (90, LARGE, shared.FULL): Config(64, 64, 32, 8, 3),
        (90, SMALL, shared.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, shared.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (90, SMALL, shared.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
        (100, LARGE, shared.HALF): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, shared.HALF_PADDED): Config(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, shared.HALF_MASKED): Config(128, 64, 64, 8, 3, tma=True),
        (100, LARGE, shared.FULL): Config(64, 32, 16, 4, 3),
        (100, SMALL, shared.HALF): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, shared.HALF_PADDED): Config(64, 64, 64, 4, 4, tma=True),
        (100, SMALL, shared.HALF_MASKED): Config(64, 64, 64, 4, 4, tma=True),
    },
    shared.candidates(),
)


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, block: Block, space: Workspace
) -> Tensor:
    """[] the sum of the block's pair losses; see `tiles.forward_block`.

    Raises:
        InputError: the features are not on a GPU.
    """
    if not shared.runs(rows):
        return tiles.forward_block(rows, columns, scale, bias, block, space)
    if not rows.shape[0] or not columns.shape[0]:
        return scale.new_zeros(())
    programs = shared.programs(rows, columns)
    config = choose(TUNING, shared.kind_of(rows.dtype, block), rows.device, programs)
    losses = scale.new_empty(programs(config))
    absent = {"gradient": None, "gradient_stride": None, "gradient_sums": None}
    arguments = shared.pair_arguments(rows, columns, scale, block, config) | absent
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        sigmoid_tile[losses.shape](**arguments, start=0, n=len(rows), bias=bias, losses=losses, **config.options())
    return losses.sum()


def backward_block(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block: Block,
    d_rows: Tensor,
    d_columns: Tensor,
    d_bias: Tensor,
    space: Workspace,
) -> Tensor:
    """Add one block's gradients, without the factor `scale`, and return its loss; see `tiles.backward_block`.

    Raises:
        InputError: the features are not on a GPU.
    """
    if not shared.runs(rows):
        return tiles.backward_block(rows, columns, scale, bias, block, d_rows, d_columns, d_bias, space)
    n, m = rows.shape[0], columns.shape[0]
    loss = scale.new_zeros(())
    if not n or not m:
        return loss

    @functools.cache
    def arguments(config: Config) -> dict[str, Any]:
        return shared.pair_arguments(rows, columns, scale, block, config)

    def launch(config: Config, start: int, height: int, room: Tensor) -> tuple[Tensor, Tensor]:
        """Rows start … start + height of the gradient tile, at most; losses and sums of gradients, one a program."""
        stop = min(n, start + height)
        programs = triton.cdiv(stop - start, config.rows) * triton.cdiv(m, config.columns)
        losses, sums = scale.new_empty((2, programs)).unbind()
        sigmoid_tile[(programs,)](
            **arguments(config),
            start=start,
            n=stop,
            bias=bias,
            losses=losses,
            gradient=room,
            gradient_stride=room.stride(0),
            gradient_sums=sums,
            **config.options(),
        )
        return losses, sums

    def first_piece(config: Config) -> None:
        launch(config, 0, *shared.gradient_room(rows, m, config.rows))

    with torch.cuda.device_of(rows):
        kind = shared.kind_of(rows.dtype, block)
        config = choose(TUNING, kind, rows.device, shared.programs(rows, columns), first_piece)
        height, room = shared.gradient_room(rows, m, config.rows)
        for start in range(0, n, height):
            stop = min(n, start + height)
            losses, sums = launch(config, start, height, room)
            loss += losses.sum()
            if d_bias.numel():
                d_bias += sums.sum()
            gradient = room[: stop - start, :m]
            if d_rows.numel():
                accumulate(d_rows[start:stop], gradient, columns)
            if d_columns.numel():
                accumulate(d_columns, gradient.t(), rows[start:stop])
    return loss


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration of sm_`capability` (80, 90, 100), for compilation ahead of time; D is no constant."""
    table, sums = TUNING.at(capability), {"bias": "*fp32", "losses": "*fp32"}
    absent = {"gradient": None, "gradient_stride": None, "gradient_sums": None}
    yield from shared.pair_cases("sigmoid forward", sigmoid_tile, table, sums, absent)
    written = {"gradient": "*features", "gradient_stride": "i32", "gradient_sums": "*fp32"}
    yield from shared.pair_cases("sigmoid backward", sigmoid_tile, table, sums | written, {})
