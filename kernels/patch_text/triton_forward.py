"""Pooling of patch–text scores and the sums of the InfoNCE over it, in Triton; patch scores live in registers only.

    max:      S_ij = max_p v_ip·t_j, and P − (the first best p)
    softmax:  S_ij = m + Σ_p w_p (s_p − m) / Σ_p w_p,  w_p = e^((s_p − m)/τ), and log Σ_p e^(s_p/τ); m and both sums run
              over p, and padding, with s_p = −3e38, drops out of them as soon as m is a real score
    rows:     Σ_j e^(a S_ij),  columns: Σ_i e^(a S_ij),  over the negatives, as (reference, total): total · e^reference

A program has a tile of texts and a few images, one after the other. It walks an image's patches, D inside; texts are
the tile's rows, patches its columns, so that pooling reduces along a thread's own registers. What is then one number a
text is taken out if the pair is no negative (padding, the text's own image, an equal id; what the conflict filter found
is read, a byte a pair), and added to the texts' running sums, which stay in registers. The image's sum over the tile
goes to `row_partials`, a line a tile of texts; the texts' sums go to `column_partials`, a line a group of images. A
second kernel joins such lines. Nothing is recomputed, nothing summed by atomics: the same input gives the same bits.

Programs of the same images follow each other: their patches come from memory once and are then in the L2, as are the
chunk's texts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.info_nce.triton_forward import FLOOR, MERGED, merge
from cllip_fast.kernels.info_nce.triton_tiles import largest
from cllip_fast.kernels.patch_text.contrast import Pairs
from cllip_fast.kernels.patch_text.exclusions import conflicts
from cllip_fast.kernels.patch_text.triton_operands import (
    FULL,
    HALF,
    KINDS,
    UNALIGNED,
    described_product,
    kind_of,
    launch_options,
    operands,
)
from cllip_fast.kernels.triton_patches import Tile, product, rows_contiguous
from cllip_fast.kernels.tuning import LARGE, Table, choose, processors

TILES = Table(
    "patch_text forward",
    {(0, LARGE, kind): Tile(16, 32, 16, 4, 2, tma=True) for kind in KINDS}
    | {
        (0, LARGE, HALF[-1]): Tile(32, 16, 16, 4, 2, tma=True),
        (0, LARGE, UNALIGNED): Tile(16, 16, 16, 4, 2),
        (80, LARGE, HALF[0]): Tile(128, 128, 32, 8, 4),
        (80, LARGE, HALF[1]): Tile(128, 128, 32, 8, 4),
        (80, LARGE, HALF[2]): Tile(128, 64, 32, 4, 4),
        (80, LARGE, UNALIGNED): Tile(128, 64, 32, 4, 4),
        (80, LARGE, FULL): Tile(64, 64, 32, 4, 2),
        (90, LARGE, HALF[0]): Tile(128, 256, 64, 8, 4, tma=True),
        (90, LARGE, HALF[1]): Tile(128, 128, 64, 4, 3, tma=True),
        (90, LARGE, HALF[2]): Tile(128, 64, 64, 4, 4, tma=True),
        (90, LARGE, UNALIGNED): Tile(128, 64, 64, 4, 4),
        (90, LARGE, FULL): Tile(64, 64, 16, 8, 2),
        (100, LARGE, HALF[0]): Tile(128, 128, 64, 8, 4, tma=True),
        (100, LARGE, HALF[1]): Tile(128, 128, 64, 8, 4, tma=True),
        (100, LARGE, HALF[2]): Tile(64, 64, 64, 4, 4, tma=True),
        (100, LARGE, UNALIGNED): Tile(64, 64, 64, 4, 4),
        (100, LARGE, FULL): Tile(64, 64, 16, 4, 2),
    },
    {
        (80, HALF[0]): (Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4)),
        (80, HALF[1]): (Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4)),
        (90, HALF[0]): (Tile(128, 128, 64, 4, 3, tma=True), Tile(128, 64, 64, 4, 4, tma=True)),
        (90, HALF[1]): (Tile(128, 128, 64, 8, 4, tma=True), Tile(128, 64, 64, 4, 4, tma=True)),
        (100, HALF[0]): (Tile(128, 64, 64, 4, 4, tma=True), Tile(64, 64, 64, 4, 4, tma=True)),
        (100, HALF[1]): (Tile(128, 64, 64, 4, 4, tma=True), Tile(64, 64, 64, 4, 4, tma=True)),
    },
)
"""Not tuned on a device: what the compiler fits into registers and shared memory without spills. In the interpreter
every loop goes round several times. There is no small class: only a few images with few texts would idle a device.
"""

WAVES = 16
"""Programs for each multiprocessor, at least, as long as there are images: the last wave is rarely full."""

IDS = tl.constexpr(8)
"""Ids of an image's own texts compared at a time."""

LOWEST = tl.constexpr(-3.0e38)
"""In place of −∞ under softmax, where ∞ − ∞ would make NaN."""


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _has_id(id, own_ids, own_valid, image, own_texts):
    """[BLOCK_T] bool: whether the image has a valid text of that id."""
    found = tl.zeros(id.shape, tl.int32)
    for start in range(0, own_texts, IDS):
        k = start + tl.arange(0, IDS)
        place = image * own_texts + k
        valid = tl.load(own_valid + place, mask=k < own_texts, other=0) != 0
        same = (id[:, None] == tl.load(own_ids + place, mask=valid, other=0)[None, :]) & valid[None, :]
        found = tl.maximum(found, tl.max(same.to(tl.int32), 1))
    return found != 0


@triton.jit(do_not_specialize=("images", "images_per_program", "own_texts"))
def forward_kernel(
    patches,
    texts,
    patch_mask,
    scale,
    owner,
    ids,
    own_ids,
    own_valid,
    excluded,
    pooled,
    saved,
    positive,
    row_partials,
    column_partials,
    images,
    images_per_program,
    count,
    columns,
    width,
    own_texts,
    image_stride,
    patch_stride,
    text_stride,
    pooled_stride,
    saved_stride,
    inverse_temperature,
    SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """`count` = P, `columns` = t, `width` = D. Partials [2, text tiles, B] and [2, image groups, t]."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    NONE: tl.constexpr = float("-inf")
    tiles = tl.cdiv(columns, BLOCK_T)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    groups = tl.num_programs(0) // tiles
    column = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = column < columns
    of_text = tl.load(owner + column, mask=inside, other=-1)
    a = tl.load(scale)
    column_reference = tl.full((BLOCK_T,), FLOOR, tl.float32)
    column_total = tl.zeros((BLOCK_T,), tl.float32)
    begin = group * images_per_program
    for number in range(begin, tl.minimum(begin + images_per_program, images)):
        image = tl.full((), number, tl.int64)
        top = tl.full((BLOCK_T,), LOWEST if SOFTMAX else NONE, tl.float32)
        best = tl.zeros((BLOCK_T,), tl.int32)
        total, weighted = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, count, BLOCK_P):
            patch = start + tl.arange(0, BLOCK_P)
            real = patch < count
            if TMA:
                scores = described_product(
                    texts, patches, tile * BLOCK_T, number, start, width, BLOCK_T, BLOCK_P, BLOCK_D, True
                )
            else:
                # What lies beyond the last text or patch is the last once more.
                text = texts + tl.minimum(column, columns - 1).to(tl.int64) * text_stride
                row = patches + image * image_stride + tl.minimum(patch, count - 1).to(tl.int64) * patch_stride
                scores = product(text, row, width, BLOCK_D, EVEN_D)
            if patch_mask is not None:
                real &= tl.load(patch_mask + image * count + patch, mask=real, other=0) != 0
            scores = tl.where(real[None, :], scores, LOWEST if SOFTMAX else NONE)
            if SOFTMAX:
                here = tl.maximum(top, tl.max(scores, 1))
                decay = tl.exp2((top - here) * (inverse_temperature * LOG2_E))
                below = scores - here[:, None]
                weights = tl.exp2(below * (inverse_temperature * LOG2_E))
                weighted = weighted * decay + (top - here) * (total * decay) + tl.sum(weights * below, 1)
                total = total * decay + tl.sum(weights, 1)
                top = here
            else:
                here = tl.reduce(scores, 1, _larger)
                first = tl.min(tl.where(scores == here[:, None], patch[None, :], count), 1)
                better = (here > top) | (here != here)  # NaN is passed on
                best = tl.where(better, first, best)
                top = tl.where(better, here, top)
        if SOFTMAX:
            score = top + weighted / total
            score = tl.where(score <= LOWEST, NONE, score)  # no real patch
            tl.store(saved + image * saved_stride + column, tl.log(total) + top * inverse_temperature, mask=inside)
        else:
            score = top
            number_of_best = (count - best).to(saved.dtype.element_ty)
            tl.store(saved + image * saved_stride + column, number_of_best, mask=inside)

        own = of_text == image
        counts = inside & (of_text >= 0)
        if own_ids is not None:
            id = tl.load(ids + column, mask=inside, other=0)
            counts = counts & ~_has_id(id, own_ids, own_valid, image, own_texts)
        if excluded is not None:
            counts = counts & (tl.load(excluded + image * columns + column, mask=inside, other=1) == 0)
        score = tl.where(counts | own, score, NONE)
        tl.store(pooled + image * pooled_stride + column, score, mask=inside)
        tl.store(positive + column, score, mask=own)

        logits = tl.where(own, NONE, a * score)
        row_reference = largest(logits)
        row_reference = tl.where(row_reference == NONE, 0.0, row_reference)
        row_total = tl.sum(tl.reshape(tl.exp(logits - row_reference), (2, BLOCK_T // 2)))
        line = row_partials + tile.to(tl.int64) * images + image
        tl.store(line, row_reference)
        tl.store(line + tiles.to(tl.int64) * images, row_total)
        both = tl.maximum(column_reference, logits)
        column_total = column_total * tl.exp(column_reference - both) + tl.exp(logits - both)
        column_reference = both
    line = column_partials + group.to(tl.int64) * columns + column
    tl.store(line, column_reference, mask=inside)
    tl.store(line + groups.to(tl.int64) * columns, column_total, mask=inside)


def forward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    softmax: bool,
    temperature: float,
    scale: Tensor,
    pairs: Pairs,
    pooled: Tensor,
    saved: Tensor,
    positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """`tiles.forward_block` for bf16, fp16 and fp32; runs in the type of `texts`."""
    (images, count, width), columns = patches.shape, texts.shape[0]
    row_max, row_total = scale.new_zeros((2, images)).unbind()
    column_max, column_total = scale.new_zeros((2, columns)).unbind()
    if not images or not columns:
        return row_max + row_total.log(), column_max + column_total.log()
    patches, texts = rows_contiguous(patches, texts.dtype), rows_contiguous(texts, texts.dtype)
    by_ids = pairs.own_ids is not None
    arguments = {
        "patch_mask": None if patch_mask is None else patch_mask.contiguous(),
        "scale": scale,
        "owner": pairs.owner,
        "ids": pairs.ids if by_ids else None,
        "own_ids": pairs.own_ids.contiguous() if by_ids else None,
        "own_valid": pairs.own_valid.contiguous() if by_ids else None,
        "excluded": conflicts(pairs.own_valid, texts, None, None, pairs.own_texts, pairs.threshold),
        "pooled": pooled,
        "saved": saved,
        "positive": positive,
        "images": images,
        "count": count,
        "columns": columns,
        "width": width,
        "own_texts": pairs.own_valid.shape[1],
        "image_stride": patches.stride(0),
        "patch_stride": patches.stride(1),
        "text_stride": texts.stride(0),
        "pooled_stride": pooled.stride(0),
        "saved_stride": saved.stride(0),
        "inverse_temperature": 1 / temperature,
        "SOFTMAX": softmax,
    }

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        """[2, text tiles, B] and [2, image groups, t]: the partial sums."""
        tiles = triton.cdiv(columns, tile.texts)
        images_per_program = max(1, images * tiles // (WAVES * processors(texts.device)))
        groups = triton.cdiv(images, images_per_program)
        partials = scale.new_empty((2, tiles, images)), scale.new_empty((2, groups, columns))
        tma, features = operands(tile, patches, texts)
        forward_kernel[(groups * tiles,)](
            *features,
            row_partials=partials[0],
            column_partials=partials[1],
            images_per_program=images_per_program,
            **arguments,
            **launch_options(tile, width, tma),
        )
        return partials

    def programs(tile: Tile) -> int:
        return images * triton.cdiv(columns, tile.texts)

    rows, lines = launch(choose(TILES, kind_of(patches, texts), texts.device, programs, launch))
    merge[(triton.cdiv(images, MERGED["SIZE"]),)](rows, row_max, row_total, rows.shape[1], images, **MERGED)
    merge[(triton.cdiv(columns, MERGED["SIZE"]),)](lines, column_max, column_total, lines.shape[1], columns, **MERGED)
    return row_max + row_total.log(), column_max + column_total.log()
