"""Symmetric InfoNCE on the CPU in fp32, whole blocks by `csrc/`; fp64 is done by `tiles.py`, whose functions these are.

Rows and columns keep their true running maxima; one exponential a score serves both wherever the maxima of a tile lie
close enough together, two otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import tiles
from cllip_fast.kernels.info_nce.tiles import RowStatistics

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
    column_max, column_sum = statistics.total.new_zeros((2, columns.shape[0])).unbind()
    of_rows = statistics.maximum, statistics.total, statistics.positive
    native.call("info_nce_forward", rows, columns, scale, block, *of_rows, column_max, column_sum)
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
    row_values, column_values = row_values.contiguous(), column_values.contiguous()
    shared = reference is not None and not split and row_part is None
    if shared:
        row_values, column_values = (_relative_to(reference, each) for each in (row_values, column_values))
    native.call(
        "info_nce_backward",
        rows,
        columns,
        scale,
        block,
        row_values,
        column_values,
        reference if shared else 0.0,
        shared,
        split,
        row_part,
        d_rows=d_rows,
        d_columns=d_columns,
    )


def _relative_to(reference: float, values: Tensor) -> Tensor:
    maximum, factor, weight = values
    return torch.stack([maximum, torch.exp(reference - maximum).mul_(factor), weight])
