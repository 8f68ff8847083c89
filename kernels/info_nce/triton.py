"""Symmetric InfoNCE on a GPU in bf16, fp16 and fp32, by Triton; fp64 is done by `tiles.py`, whose functions these are.

`triton_forward.py` and `triton_backward.py` hold the kernels. No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import tiles, triton_backward, triton_forward
from cllip_fast.kernels.info_nce.tiles import RowStatistics
from cllip_fast.kernels.info_nce.triton_tiles import runs
from cllip_fast.kernels.tuning import CompileCase

__all__ = ["RowStatistics", "backward_block", "compile_cases", "forward_block"]


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, block: Block, statistics: RowStatistics, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Update the rows' running statistics with one block and return the columns'; see `tiles.forward_block`.

    Raises:
        InputError: the features are not on a GPU.
    """
    if not runs(rows):
        return tiles.forward_block(rows, columns, scale, block, statistics, space)
    running = statistics.maximum, statistics.total, statistics.positive
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        return triton_forward.forward(rows, columns, scale, block, *running)


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

    `reference` is not needed: each tile finds its own.

    Raises:
        InputError: the features are not on a GPU.
    """
    if not runs(rows):
        more = {"reference": reference, "split": split, "row_part": row_part}
        tiles.backward_block(rows, columns, scale, block, row_values, column_values, d_rows, d_columns, space, **more)
        return
    if not rows.shape[0] or not columns.shape[0]:
        return
    sides = rows, columns, scale, block, row_values.contiguous(), column_values.contiguous(), d_rows, d_columns
    with torch.cuda.device_of(rows):
        if row_part is None and rows.shape[1] <= triton_backward.FUSED_WIDTH:
            triton_backward.fused(*sides, split)
        else:
            triton_backward.by_products(*sides, split, row_part)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel and configuration of sm_`capability` (80, 90, 100), for compilation ahead of time."""
    yield from triton_forward.compile_cases(capability)
    yield from triton_backward.compile_cases(capability)
