"""Pairwise sigmoid loss on the CPU in fp32: products by PyTorch, the rest of a tile's work in `csrc/sigmoid.h`.

The same functions as in `tiles.py`, which does fp64.
"""

from __future__ import annotations

from ctypes import byref, c_double

from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.products import accumulate, scores
from cllip_fast.kernels.sigmoid import tiles


def forward_block(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, block: Block, space: Workspace
) -> Tensor:
    """[] the sum of the block's pair losses; see `tiles.forward_block`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(rows):
        return tiles.forward_block(rows, columns, scale, bias, block, space)
    exclusions, offset = native.Exclusions(block, columns, space), 0.0 if bias is None else bias.item()
    total = c_double()
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        native.call("sigmoid_forward", tile, exclusions, start, offset, byref(total))
    return scale.new_tensor(total.value)


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
) -> None:
    """Add one block's gradients, without the factor `scale`; see `tiles.backward_block`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(rows):
        return tiles.backward_block(rows, columns, scale, bias, block, d_rows, d_columns, d_bias, space)
    exclusions, offset = native.Exclusions(block, columns, space), 0.0 if bias is None else bias.item()
    total = c_double()
    for start, stop in space.spans(rows.shape[0]):
        tile = scores(rows[start:stop], columns, scale, space.tile(0, stop - start, columns.shape[0]))
        native.call("sigmoid_backward", tile, exclusions, start, offset, byref(total))
        if d_rows.numel():
            accumulate(d_rows[start:stop], tile, columns)
        if d_columns.numel():
            accumulate(d_columns, tile.t(), rows[start:stop])
    if d_bias.numel():
        d_bias += total.value
