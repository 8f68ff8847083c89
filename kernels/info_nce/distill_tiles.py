"""InfoNCE and its distillation from a teacher's softmax in one walk, plain PyTorch: the specification.

With student scores s_ij, teacher scores z_ij and their row softmaxes p, t (column softmaxes p', t'):

    contrastive = Σ_i r_i (lse_i − s_ii)             + Σ_j c_j (lse'_j − s_jj)
    distill     = Σ_i r̃_i (lse_i − Σ_j t_ij s_ij)    + Σ_j c̃_j (lse'_j − Σ_i t'_ij s_ij)
    G_ij        = (r_i + r̃_i) p_ij − r̃_i t_ij − [i = j] r_i   + the same for columns

Forward, two products (student, teacher) and running (maximum, Σ e^s), (maximum, Σ e^z, Σ e^z s) for rows and columns;
backward, four. Student and teacher features lie side by side in rows and columns. Deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce.tiles import FLOOR
from cllip_fast.kernels.products import accumulate, scores


def start_statistics(size: int, like: Tensor) -> Tensor:
    """[5, size] running statistics: student maximum, Σ e^s; teacher maximum, Σ e^z, Σ e^z s."""
    statistics = like.new_zeros((5, size))
    statistics[0] = statistics[2] = FLOOR
    return statistics


def forward_block(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    block: Block,
    row_statistics: Tensor,
    positive: Tensor,
    space: Workspace,
    *,
    width: int,
) -> Tensor:
    """Update the rows' running statistics with one block and return the columns' [5, m].

    Args:
        rows, columns: [n, D + D'], [m, D + D'] student | teacher, in the products' type.
        scale: [2] student, teacher, in the accumulation type.
        block: positives and padding.
        row_statistics: [5, n], updated in place; see `start_statistics`.
        positive: [n], s_ii, updated in place.
        space: tile buffers.
        width: D.
    """
    column_statistics = start_statistics(columns.shape[0], scale)
    for start, stop in space.spans(rows.shape[0]):
        student, teacher = _tiles(rows[start:stop], columns, scale, width, space)
        diagonal = block.diagonal(student, start)
        if diagonal is not None:
            positive[block.rows_of(start, stop)] = diagonal
        _update(row_statistics[:, start:stop], student, teacher, block, space, dim=1)
        _update(column_statistics, student, teacher, block, space, dim=0)
    return column_statistics


def _update(statistics: Tensor, student: Tensor, teacher: Tensor, block: Block, space: Workspace, dim: int) -> None:
    scratch = space.tile(2, *student.shape)
    for tile, index in ((student, 0), (teacher, 2)):
        maximum, totals = statistics[index], statistics[index + 1 : index + 2 + index // 2]
        padded = tile if block.column_valid is None else tile.masked_fill(~block.column_valid, float("-inf"))
        new = torch.maximum(maximum, padded.amax(dim))
        totals.mul_(maximum.sub(new).exp_())
        maximum.copy_(new)
        torch.sub(padded, new.unsqueeze(dim), out=scratch).exp_()
        totals[0] += scratch.sum(dim)
    totals[1] += scratch.mul_(student).sum(dim)


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
    split: bool,
    row_part: Tensor | None,
    width: int,
) -> None:
    """Add one block's gradients, without the factor `scale`, to d_rows [n, D] and d_columns [m, D].

    Args:
        row_values: [5, n] student maximum, (r + r̃) / total, teacher maximum, r̃ / total, r; column_values: [5, m] alike.
        reference: not used; two exponentials a score are always exact.
        width: D. The others are as in `tiles.backward_block`.
    """
    for start, stop in space.spans(rows.shape[0]):
        student, teacher = _tiles(rows[start:stop], columns, scale, width, space)
        values = row_values[:, start:stop, None]
        by_row = _gradient_tile(student, teacher, values, space.tile(2, *student.shape))
        by_column = _gradient_tile(student, teacher, column_values[:, None], space.tile(3, *student.shape))
        for tile, weight in ((by_row, values[4]), (by_column, column_values[4, None])):
            diagonal = block.diagonal(tile, start)
            if diagonal is not None:
                diagonal.sub_(block.diagonal(weight.expand_as(tile), start))
            if block.column_valid is not None:
                tile.masked_fill_(~block.column_valid, 0)
        if row_part is not None:
            row_part += torch.mul(by_row, student, out=teacher).sum(0)
        if not split:
            by_row = by_column = by_row.add_(by_column)
        if d_rows.numel():
            accumulate(d_rows[start:stop], by_row, columns[:, :width])
        if d_columns.numel():
            accumulate(d_columns, by_column.t(), rows[start:stop, :width])


def _tiles(rows: Tensor, columns: Tensor, scale: Tensor, width: int, space: Workspace) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], columns.shape[0])
    student = scores(rows[:, :width], columns[:, :width], scale[0], space.tile(0, *shape))
    return student, scores(rows[:, width:], columns[:, width:], scale[1], space.tile(1, *shape))


def _gradient_tile(student: Tensor, teacher: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """(r + r̃) p − r̃ t; `values` broadcast along the rows or the columns."""
    student_max, student_factor, teacher_max, teacher_factor, _ = values
    torch.sub(student, student_max, out=out).exp_().mul_(student_factor)
    return out.sub_((teacher - teacher_max).exp_().mul_(teacher_factor))
