"""Symmetric InfoNCE on the CPU in fp32: products by PyTorch, the rest of a tile's work in `csrc/info_nce.h`.

The same functions as in `tiles.py`, which does fp64. Rows and columns keep their true running maxima; one exponential a
score serves both wherever the maxima of a tile lie close enough together, two otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import tiles
from cllip_fast.kernels.info_nce.tiles import RowStatistics
from cllip_fast.kernels.products import accumulate, scores

__all__ = ["RowStatistics", "backward_block", "forward_block"]


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, block: Block, statistics: RowStatistics, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Update the rows' running statistics with one block and return the columns'; see `tiles.forward_block`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(rows):
        return tiles.forward_block(rows, columns, scale, block, statistics, space)
    exclusions = native.Exclusions(block, columns, space)
    column_max, column_sum = statistics.total.new_zeros((2, columns.shape[0])).unbind()
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        of_rows = statistics.maximum[start:stop], statistics.total[start:stop]
        native.call("info_nce_forward", tile, exclusions, start, *of_rows, column_max, column_sum)
        diagonal = block.diagonal(tile, start)
        if diagonal is not None:
            statistics.positive[block.rows_of(start, stop)] = diagonal
    return column_max, column_sum


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
    """Add one block's gradients, without the factor `scale`; see `tiles.backward_block`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(rows):
        more = {"reference": reference, "split": split, "row_part": row_part}
        return tiles.backward_block(
            rows, columns, scale, block, row_values, column_values, d_rows, d_columns, space, **more
        )
    exclusions = native.Exclusions(block, columns, space)
    row_max, row_factor, row_weight = row_values.contiguous()
    column_max, column_factor, column_weight = column_values.contiguous()
    shared = reference is not None and not split and row_part is None
    if shared:
        row_factor = torch.exp(reference - row_max).mul_(row_factor)
        column_factor = torch.exp(reference - column_max).mul_(column_factor)
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        by_row = space.tile(1, *tile.shape) if split else None
        diagonal = block.diagonal(tile, start)
        here = block.rows_of(start, stop)
        there = slice(here.start - block.positive[0] + block.positive[1], None)
        there = slice(there.start, there.start + here.stop - here.start)
        if row_part is not None and diagonal is not None:
            row_part[there] -= row_weight[here] * diagonal
        native.call(
            "info_nce_backward",
            tile,
            exclusions,
            start,
            row_max[start:stop],
            row_factor[start:stop],
            column_max,
            column_factor,
            reference if shared else 0.0,
            shared,
            by_row,
            row_part,
        )
        if split and diagonal is not None:
            block.diagonal(by_row, start).sub_(row_weight[here])
            diagonal.sub_(column_weight[there])
        elif diagonal is not None:
            diagonal.sub_(row_weight[here] + column_weight[there])
        if d_rows.numel():
            accumulate(d_rows[start:stop], by_row if split else tile, columns)
        if d_columns.numel():
            accumulate(d_columns, tile.t(), rows[start:stop])
