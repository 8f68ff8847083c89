"""Pairwise sigmoid loss, plain PyTorch: the specification. Row tiles of bounded size; the maths is in `__init__.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.products import accumulate, scores

LINEAR_FROM = 40.0
"""Beyond this softplus(x) is x, in fp64 too."""


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, block: Block, space: Workspace
) -> Tensor:
    """[] the sum of the block's pair losses.

    Args:
        rows, columns: [n, D], [m, D] in the products' type.
        scale, bias: [] in the accumulation type; bias None is 0.
        block: positives and padding.
        space: tile buffers.
    """
    total = torch.zeros_like(scale)
    for start, stop in space.spans(rows.shape[0]):
        tile = _signed_tile(rows, columns, scale, bias, block, space, start, stop)
        scratch = space.tile(1, *tile.shape)
        total += torch.ops.aten.softplus.out(tile, 1, LINEAR_FROM, out=scratch).sum()
    return total


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
    """Add one block's gradients, without the factor `scale`, to d_rows [n, D], d_columns [m, D], d_bias [].

    Accumulators with 0 elements are not wanted and skipped.

    Returns:
        [] what `forward_block` returns.
    """
    total = torch.zeros_like(scale)
    for start, stop in space.spans(rows.shape[0]):
        tile = _signed_tile(rows, columns, scale, bias, block, space, start, stop)
        total += torch.ops.aten.softplus.out(tile, 1, LINEAR_FROM, out=space.tile(1, *tile.shape)).sum()
        tile.sigmoid_()
        diagonal = block.diagonal(tile, start)
        if diagonal is not None:
            diagonal.neg_()
        if d_bias.numel():
            d_bias += tile.sum()
        if d_rows.numel():
            accumulate(d_rows[start:stop], tile, columns)
        if d_columns.numel():
            accumulate(d_columns, tile.t(), rows[start:stop])
    return total


def _signed_tile(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block: Block,
    space: Workspace,
    start: int,
    stop: int,
) -> Tensor:
    """Tile of −z_ij l_ij; a padded pair is −∞, which has neither loss nor gradient."""
    tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
    if bias is not None:
        tile.add_(bias)
    diagonal = block.diagonal(tile, start)
    if diagonal is not None:
        diagonal.neg_()
    block.exclude(tile, start, columns, space)
    return tile
