"""Pairwise sigmoid loss on the CPU in fp32, whole blocks by `csrc/`; `tiles.py` has the same functions for fp64."""

from __future__ import annotations

from ctypes import byref, c_double

from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.kernels.block import Block, Workspace
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
    loss = c_double()
    native.call("sigmoid_forward", rows, columns, scale, block, _number(bias), byref(loss))
    return scale.new_tensor(loss.value)


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
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(rows):
        return tiles.backward_block(rows, columns, scale, bias, block, d_rows, d_columns, d_bias, space)
    loss, total = c_double(), c_double()
    sums = byref(loss), byref(total)
    native.call(
        "sigmoid_backward", rows, columns, scale, block, _number(bias), *sums, d_rows=d_rows, d_columns=d_columns
    )
    if d_bias.numel():
        d_bias += total.value
    return scale.new_tensor(loss.value)


def _number(bias: Tensor | None) -> float:
    return 0.0 if bias is None else bias.item()
