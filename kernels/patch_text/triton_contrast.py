"""The gradient of the InfoNCE with respect to pooled scores, in Triton: one pass over them.

    G_ij = row_weight_i e^(a S_ij − row_lse_i) + column_weight_j e^(a S_ij − column_lse_j), or d_positive_j     Σ G S

4 bytes of a pair are read, 4 written; everything else is one number an image or a text. A program has a stretch of one
image's texts; its part of Σ G S goes to a line of its own. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.patch_text.contrast import Pulls

TEXTS = 1024
"""Of a program, at most."""


@triton.jit
def gradient_kernel(
    pooled,
    scale,
    factor,
    row_lse,
    row_weight,
    column_lse,
    column_weight,
    d_positive,
    owner,
    gradient,
    totals,
    columns,
    pooled_stride,
    BLOCK_T: tl.constexpr,
):
    NONE: tl.constexpr = float("-inf")
    tiles = tl.cdiv(columns, BLOCK_T)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = column < columns
    score = tl.load(pooled + image * pooled_stride + column, mask=inside, other=NONE)
    logits = tl.load(scale) * score
    of_row = tl.load(row_weight + image) * tl.exp(logits - tl.load(row_lse + image))
    of_column = tl.load(column_weight + column, mask=inside, other=0.0) * tl.exp(
        logits - tl.load(column_lse + column, mask=inside, other=0.0)
    )
    own = tl.load(owner + column, mask=inside, other=-1) == image
    result = tl.where(own, tl.load(d_positive + column, mask=inside, other=0.0), of_row + of_column)
    tl.store(gradient + image * columns + column, result * tl.load(factor), mask=inside)
    tl.store(totals + tl.program_id(0), tl.sum(result * tl.where(score == NONE, 0.0, score)))


def pooled_gradient(pooled: Tensor, pulls: Pulls, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`contrast.pooled_gradient` for scores in fp32."""
    images, columns = pooled.shape
    gradient = pooled.new_empty((images, columns))
    if not gradient.numel():
        return gradient, pooled.new_zeros(())
    block = min(TEXTS, triton.next_power_of_2(columns))
    programs = images * triton.cdiv(columns, block)
    totals = pooled.new_empty(programs)
    gradient_kernel[(programs,)](
        pooled,
        pulls.scale,
        factor,
        pulls.row_lse,
        pulls.row_weight,
        pulls.column_lse,
        pulls.column_weight,
        pulls.d_positive,
        pulls.owner,
        gradient,
        totals,
        columns,
        pooled.stride(0),
        BLOCK_T=block,
        num_warps=4,
    )
    return gradient, totals.sum()
