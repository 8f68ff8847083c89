"""Symmetric InfoNCE, plain PyTorch: the specification. Row tiles of bounded size; the maths is in `__init__.py`.

Two exponentials a score, one against the row's running maximum and one against the column's, are exact for any scores.
As long as no score exceeds `SHARED_LIMIT`, one exponential against a shared reference serves both, exact as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.products import accumulate, scores

SHARED_LIMIT = 60.0
"""Scores up to this size share the reference 0: e^60 times a million columns is far from fp32's largest number."""

FLOOR = -1e30
"""Running maximum before the first pair; finite: a row without any pair gives exp(FLOOR − FLOOR) · 0, not NaN."""


@dataclass(slots=True)
class RowStatistics:
    """Running statistics of the local rows [n]: Σ_j e^{s_ij} = total · e^maximum, and the positives' scores s_ii.

    `shared` stays True as long as every score seen is small enough for the reference 0.
    """

    maximum: Tensor
    total: Tensor
    positive: Tensor
    shared: bool

    @classmethod
    def start(cls, rows: int, like: Tensor) -> RowStatistics:
        """Empty statistics. Looking at a tile's extremes would stall a GPU, so there `shared` starts as False."""
        maximum, total, positive = like.new_zeros((3, rows)).unbind()
        return cls(maximum, total, positive, shared=not like.is_cuda)


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, block: Block, statistics: RowStatistics, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Update the rows' running statistics with one block and return the columns'.

    Args:
        rows, columns: [n, D], [m, D] in the products' type.
        scale: [] in the accumulation type.
        block: positives and exclusions.
        statistics: of the rows, updated in place.
        space: tile buffers.

    Returns:
        maximum [m], total [m] of the columns over the local rows.
    """
    column_max, column_sum = statistics.total.new_zeros((2, columns.shape[0])).unbind()
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        if statistics.shared:
            statistics.shared = max(abs(bound) for bound in torch.stack(tile.aminmax()).tolist()) <= SHARED_LIMIT
        block.exclude(tile, start, columns, space)
        diagonal = block.diagonal(tile, start)
        if diagonal is not None:
            statistics.positive[block.rows_of(start, stop)] = diagonal
        if statistics.shared:
            tile.exp_()
            statistics.total[start:stop] += tile.sum(1)
            column_sum += tile.sum(0)
        else:
            scratch = space.tile(1, *tile.shape)
            _update(statistics.maximum[start:stop], statistics.total[start:stop], tile, scratch, dim=1)
            _update(column_max, column_sum, tile, scratch, dim=0)
    return column_max, column_sum


def _update(maximum: Tensor, total: Tensor, tile: Tensor, scratch: Tensor, dim: int) -> None:
    before = torch.where(total == 0, FLOOR, maximum)
    torch.maximum(before, tile.amax(dim), out=maximum)
    torch.sub(tile, maximum.unsqueeze(dim), out=scratch).exp_()
    total.mul_(before.sub_(maximum).exp_()).add_(scratch.sum(dim))


def backward_block(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    block: Block,
    row_values: Tensor,
    column_values: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    space: Workspace,
    *,
    reference: float | None,
    split: bool = False,
    row_part: Tensor | None = None,
) -> None:
    """Add one block's gradients, without the factor `scale`, to d_rows [n, D] and d_columns [m, D].

    Args:
        rows, columns, scale, block, space: as in `forward_block`.
        row_values: [3, n] maximum, r / total and r of the rows: r · softmax = e^{s − maximum} · r / total, which rounds
            less than through a log-sum-exp. column_values: [3, m] the same of the columns, with c for r.
        d_rows, d_columns: accumulators; one with 0 elements is not wanted and skipped.
        reference: all log-sum-exps lie within 40 of it, so one exponential e^{s − reference} serves rows and columns;
            None: two exponentials, always exact.
        split: d_rows takes the row softmax only, d_columns the column softmax only.
        row_part: [m] or None; += Σ_i r_i (softmax_ij − [i = j]) s_ij.
    """
    (row_max, row_factor, row_weight), (column_max, column_factor, column_weight) = row_values, column_values
    apart = split or row_part is not None
    if reference is not None and not apart:
        row_factor = torch.exp(reference - row_max).mul_(row_factor)
        column_factor = torch.exp(reference - column_max).mul_(column_factor)
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        block.exclude(tile, start, columns, space)
        scratch = space.tile(1, *tile.shape)
        here = block.rows_of(start, stop)
        there = slice(here.start - block.positive[0] + block.positive[1], None)
        there = slice(there.start, there.start + here.stop - here.start)
        if reference is not None and not apart:
            if reference:
                tile.sub_(reference)
            torch.add(row_factor[start:stop, None], column_factor, out=scratch)
            tile.exp_().mul_(scratch)
            _subtract(block.diagonal(tile, start), row_weight[here] + column_weight[there])
            by_row = by_column = tile
        else:
            by_row = torch.sub(tile, row_max[start:stop, None], out=scratch).exp_().mul_(row_factor[start:stop, None])
            _subtract(block.diagonal(by_row, start), row_weight[here])
            if row_part is not None:
                row_part += torch.mul(by_row, tile, out=space.tile(2, *tile.shape)).sum(0)
            by_column = tile.sub_(column_max).exp_().mul_(column_factor)
            _subtract(block.diagonal(by_column, start), column_weight[there])
            if not split:
                by_row = by_column = by_row.add_(by_column)
        if d_rows.numel():
            accumulate(d_rows[start:stop], by_row, columns)
        if d_columns.numel():
            accumulate(d_columns, by_column.t(), rows[start:stop])


def _subtract(diagonal: Tensor | None, value: Tensor) -> None:
    if diagonal is not None:
        diagonal.sub_(value)
