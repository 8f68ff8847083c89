"""Pooling of patch–text scores in Triton; the patch scores live in registers only.

    max:      S_ij = max_p v_ip·t_j, and P − (the first best p)
    softmax:  S_ij = Σ_p w_p s_p / Σ_p w_p,  w_p = e^((s_p − m)/τ), and log Σ_p e^(s_p/τ); m, both sums: running over p

A program has one image and a tile of texts, and walks the image's patches, D inside. Texts are the tile's rows, patches
its columns, so that pooling reduces along a thread's own registers. Programs of one image follow each other: its
patches come from memory once and are then in the L2, as are the chunk's texts. Nothing is recomputed, nothing summed by
atomics: the same input gives the same bits.

The sums over rows and columns of the InfoNCE are left to PyTorch. They need S without the pairs that are no negatives,
and S is small: with 4 + 1 bytes a pair against 2·P·D operations a pair (200,000 at P = 196, D = 512), even ten passes
over it in the L2 are hidden behind a few per cent of the product's time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.patch_text.triton_product import Table, Tile, product, rows_contiguous, tile_for

TILES: Table = {
    0: {
        2: (Tile(16, 32, 16, 4, 2), Tile(32, 16, 16, 4, 2)),
        4: (Tile(16, 16, 16, 4, 2),),
    },
    80: {
        2: (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4)),
        4: (Tile(64, 64, 32, 4, 2),),
    },
    90: {
        2: (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4)),
        4: (Tile(64, 64, 32, 4, 2),),
    },
    100: {
        2: (Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4)),
        4: (Tile(64, 64, 32, 4, 2),),
    },
}
"""Not tuned on a device: what the compiler fits into registers and shared memory without spills. In the interpreter
every loop goes round several times.
"""

LOWEST = tl.constexpr(-3.0e38)
"""In place of −∞ under softmax, where ∞ − ∞ would make NaN."""


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pool(
    patches,
    texts,
    patch_mask,
    pooled,
    saved,
    count,
    columns,
    width,
    image_stride,
    patch_stride,
    text_stride,
    mask_stride,
    pooled_stride,
    saved_stride,
    inverse_temperature,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """One image × BLOCK_T texts, all patches; `count` = P, `columns` = t, `width` = D."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(columns, BLOCK_T)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    # Texts beyond the last are the last once more, and not stored.
    text_rows = texts + tl.minimum(column, columns - 1).to(tl.int64) * text_stride
    patches += image * image_stride
    top = tl.full((BLOCK_T,), LOWEST if SOFTMAX else float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_T,), tl.int32)
    total, weighted = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, count, BLOCK_P):
        patch = start + tl.arange(0, BLOCK_P)
        # Patches beyond the last are the last once more: never the first among equals.
        row = tl.minimum(patch, count - 1)
        scores = product(text_rows, patches + row.to(tl.int64) * patch_stride, width, BLOCK_D, EVEN_D)
        if SOFTMAX:
            real = patch < count
            if MASKED:
                real &= tl.load(patch_mask + image * mask_stride + row) != 0
            scores = tl.where(real[None, :], scores, LOWEST)
            here = tl.maximum(top, tl.max(scores, 1))
            decay = tl.exp2((top - here) * (inverse_temperature * LOG2_E))
            weights = tl.exp2((scores - here[:, None]) * (inverse_temperature * LOG2_E))
            total = total * decay + tl.sum(weights, 1)
            weighted = weighted * decay + tl.sum(weights * scores, 1)
            top = here
        else:
            if MASKED:
                real = tl.load(patch_mask + image * mask_stride + row) != 0
                scores = tl.where(real[None, :], scores, float("-inf"))
            here = tl.reduce(scores, 1, _larger)
            first = tl.min(tl.where(scores == here[:, None], patch[None, :], count), 1)
            better = (here > top) | (here != here)  # NaN is passed on
            best = tl.where(better, first, best)
            top = tl.where(better, here, top)
    inside = column < columns
    pooled += image * pooled_stride + column
    saved += image * saved_stride + column
    if SOFTMAX:
        tl.store(pooled, weighted / total, mask=inside)
        tl.store(saved, tl.log(total) + top * inverse_temperature, mask=inside)
    else:
        tl.store(pooled, top, mask=inside)
        tl.store(saved, (count - best).to(saved.dtype.element_ty), mask=inside)


def launch_pool(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    softmax: bool,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
) -> None:
    """`tiles.pool_scores` for bf16, fp16 and fp32; runs in the type of `texts`."""
    (images, count, width), columns = patches.shape, texts.shape[0]
    if images == 0 or columns == 0:
        return
    patches, texts = rows_contiguous(patches, texts.dtype), rows_contiguous(texts, texts.dtype)
    tile = tile_for(TILES, texts, count)
    mask = None if patch_mask is None else patch_mask.contiguous()
    pool[(images * triton.cdiv(columns, tile.texts),)](
        patches,
        texts,
        mask,
        pooled,
        saved,
        count,
        columns,
        width,
        *patches.stride()[:2],
        texts.stride(0),
        count,
        pooled.stride(0),
        saved.stride(0),
        1 / temperature,
        SOFTMAX=softmax,
        MASKED=mask is not None,
        BLOCK_T=tile.texts,
        BLOCK_P=tile.patches,
        BLOCK_D=tile.width,
        EVEN_D=width % tile.width == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
