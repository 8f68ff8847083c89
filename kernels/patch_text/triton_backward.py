"""Gradients of pooled patch–text scores in Triton.

    max:      dv_ip = Σ_{j: p best for i, j} G_ij t_j       dt_j = Σ_i G_ij v_i,best(i,j)
    softmax:  E_ipj = G_ij w_ipj (1 + (s_ipj − S_ij) / τ)   dv_i = E_i T   dt = Σ_i E_iᵀ v_i

max recomputes nothing. Both sums are weighted sums of rows of a table, which `sum_rows` gathers: a program owns one row
of the result and a stretch of D, and walks a list of (row, weight) that it alone reads. For texts the lists are the
images in order; for patches a stable sort of each image's arg max brings the texts of a patch together, in order.

softmax recomputes a tile of scores, and `score_gradients` writes E in the type of the features: half the bytes of fp32
scores, which two library products then consume. Three products of B·P × t × D; owning rows and columns instead, with a
recomputation for either, would take four. E is kept to `tiling.GPU_TILE` numbers, images × texts at a time.

Sums are fp32, in an order that only the sizes set; no atomics: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.patch_text.tiling import tile_spans
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
from cllip_fast.kernels.products import accumulate
from cllip_fast.kernels.triton_patches import Tile, product, rows_contiguous
from cllip_fast.kernels.tuning import LARGE, Table, choose

TILES = Table(
    "patch_text softmax gradient",
    {(0, LARGE, kind): Tile(16, 32, 16, 4, 2, tma=True) for kind in KINDS}
    | {
        (0, LARGE, HALF[-1]): Tile(32, 16, 16, 4, 2, tma=True),
        (0, LARGE, UNALIGNED): Tile(16, 16, 16, 4, 2),
        (80, LARGE, HALF[0]): Tile(128, 128, 32, 8, 4),
        (80, LARGE, HALF[1]): Tile(128, 128, 32, 8, 4),
        (80, LARGE, HALF[2]): Tile(128, 64, 32, 4, 4),
        (80, LARGE, UNALIGNED): Tile(128, 64, 32, 4, 4),
        (90, LARGE, HALF[0]): Tile(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, HALF[1]): Tile(128, 128, 64, 8, 3, tma=True),
        (90, LARGE, HALF[2]): Tile(128, 64, 64, 4, 4, tma=True),
        (90, LARGE, UNALIGNED): Tile(128, 64, 64, 4, 4),
        (100, LARGE, HALF[0]): Tile(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, HALF[1]): Tile(128, 128, 64, 8, 3, tma=True),
        (100, LARGE, HALF[2]): Tile(128, 64, 64, 4, 4, tma=True),
        (100, LARGE, UNALIGNED): Tile(128, 64, 64, 4, 4),
    }
    | {(capability, LARGE, FULL): Tile(64, 64, 32, 4, 2) for capability in (80, 90, 100)},
    {
        (80, HALF[0]): (Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4)),
        (80, HALF[1]): (Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4)),
        (90, HALF[0]): (Tile(128, 64, 64, 4, 4, tma=True), Tile(128, 128, 64, 4, 3, tma=True)),
        (90, HALF[1]): (Tile(128, 64, 64, 4, 4, tma=True), Tile(128, 128, 64, 4, 3, tma=True)),
    },
)
"""Of `softmax_gradient`. Not tuned on a device, as are those of the forward."""


class Gather(NamedTuple):
    """A configuration of `sum_rows`: table rows gathered at a time, numbers of D of a program, and warps."""

    entries: int
    width: int
    num_warps: int


ROWS = "rows"
GATHERS = Table(
    "patch_text sum_rows",
    {(0, LARGE, ROWS): Gather(4, 32, 1)}
    | {(capability, LARGE, ROWS): Gather(8, 256, 2) for capability in (80, 90, 100)},
    {(80, ROWS): (Gather(4, 256, 1), Gather(16, 256, 4), Gather(8, 512, 4), Gather(8, 128, 1))},
)
"""Of `sum_rows`. 8 × 256 half-precision numbers are 4 KiB in flight, for each of many programs."""


@triton.jit
def sum_rows(
    table,
    rows,
    weights,
    first,
    out,
    width,
    table_stride,
    out_stride,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[k] += Σ weights[e] · table[rows[e]] over the entries e = first[k] … first[k + 1] − 1."""
    stretches = tl.cdiv(width, BLOCK_D)
    row = (tl.program_id(0) // stretches).to(tl.int64)
    column = tl.program_id(0) % stretches * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    if begin < end:  # most patches are the best one of no text
        total = tl.zeros((ENTRIES, BLOCK_D), tl.float32)
        for start in range(begin, end, ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            exists = entry < end
            source = tl.load(rows + entry, mask=exists, other=0)
            weight = tl.load(weights + entry, mask=exists, other=0.0)
            places = table + source[:, None] * table_stride + column[None, :]
            values = tl.load(places, mask=exists[:, None] & inside[None, :], other=0.0)
            total += weight[:, None] * values.to(tl.float32)
        place = out + row * out_stride + column
        tl.store(place, tl.load(place, mask=inside) + tl.sum(total, 0), mask=inside)


@triton.jit
def softmax_gradient(
    patches,
    texts,
    patch_mask,
    pooled,
    saved,
    gradient,
    out,
    count,
    columns,
    width,
    image_stride,
    patch_stride,
    text_stride,
    pooled_stride,
    saved_stride,
    gradient_stride,
    out_stride,
    inverse_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """E of one image's BLOCK_P patches × BLOCK_T texts, into rows image·P + p of `out`; 0 for padded patches."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    across, down = tl.cdiv(columns, BLOCK_T), tl.cdiv(count, BLOCK_P)
    program = tl.program_id(0)
    number = program // (across * down)
    image = number.to(tl.int64)
    first_patch, first_text = program // across % down * BLOCK_P, program % across * BLOCK_T
    patch, column = first_patch + tl.arange(0, BLOCK_P), first_text + tl.arange(0, BLOCK_T)
    # What lies beyond the last patch or text is the last once more, and not stored.
    row, text = tl.minimum(patch, count - 1), tl.minimum(column, columns - 1)
    if TMA:
        scores = described_product(
            texts, patches, first_text, number, first_patch, width, BLOCK_T, BLOCK_P, BLOCK_D, False
        )
    else:
        patch_rows = patches + image * image_stride + row.to(tl.int64) * patch_stride
        scores = product(patch_rows, texts + text.to(tl.int64) * text_stride, width, BLOCK_D, EVEN_D)
    mean = tl.load(pooled + image * pooled_stride + text)
    mean = tl.where(mean == float("-inf"), 0.0, mean)  # no pair: the gradient is 0, and 0 · ∞ would be NaN
    lse = tl.load(saved + image * saved_stride + text)
    upstream = tl.load(gradient + image * gradient_stride + text)
    weights = tl.exp2(scores * (inverse_temperature * LOG2_E) - (lse * LOG2_E)[None, :])
    result = upstream[None, :] * weights * ((scores - mean[None, :]) * inverse_temperature + 1)
    if patch_mask is not None:
        real = tl.load(patch_mask + image * count + row) != 0
        result = tl.where(real[:, None], result, 0.0)
    places = out + (image * count + patch)[:, None] * out_stride + column[None, :]
    inside = (patch < count)[:, None] & (column < columns)[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=inside)


def max_backward(
    patches: Tensor, texts: Tensor, saved: Tensor, gradient: Tensor, d_patches: Tensor, d_texts: Tensor
) -> None:
    """`tiles.pool_backward` of the maximum for bf16, fp16 and fp32."""
    (images, count, _), columns = patches.shape, texts.shape[0]
    if images == 0 or columns == 0:
        return
    # In the type of `saved`: one byte sorts faster than eight. NaN scores equal no maximum; any patch will do for them.
    best = (count - saved).clamp_(max=count - 1)
    each_image = torch.arange(images, device=best.device)[:, None]
    if d_patches.numel():
        patch, text = torch.sort(best, dim=1, stable=True)
        each_patch = torch.arange(count, device=best.device).to(best.dtype).expand(images, count).contiguous()
        first = text.new_full((images * count + 1,), images * columns)
        torch.add(torch.searchsorted(patch, each_patch), each_image * columns, out=first[:-1].view(images, count))
        launch_sum_rows(texts, text, gradient.gather(1, text), first, d_patches.view(images * count, -1))
    if d_texts.numel():
        rows = (best + each_image * count).t().contiguous()
        first = torch.arange(columns + 1, device=best.device) * images
        launch_sum_rows(patches.flatten(0, 1), rows, gradient.t().contiguous(), first, d_texts)


def launch_sum_rows(table: Tensor, rows: Tensor, weights: Tensor, first: Tensor, out: Tensor) -> None:
    """Add weighted sums of rows of `table` [R, D] to `out` [K, D]; lists as in `sum_rows`, flat or of any shape."""
    table = rows_contiguous(table, table.dtype)
    targets, width = out.shape

    def programs(gather: Gather) -> int:
        return targets * triton.cdiv(width, gather.width)

    def launch(gather: Gather, out: Tensor) -> None:
        sum_rows[(programs(gather),)](
            table,
            rows,
            weights,
            first,
            out,
            width,
            table.stride(0),
            out.stride(0),
            ENTRIES=gather.entries,
            BLOCK_D=gather.width,
            num_warps=gather.num_warps,
        )

    def timed(gather: Gather) -> None:
        launch(gather, torch.empty_like(out))  # nothing may be added to `out` itself

    launch(choose(GATHERS, ROWS, out.device, programs, timed), out)


def softmax_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
    gradient: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> None:
    """`tiles.pool_backward` of the softmax for bf16, fp16 and fp32."""
    patches = patches.to(texts.dtype)
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        rows = patches[images]
        mask = None if patch_mask is None else patch_mask[images]
        of_pairs = (each[images, columns] for each in (pooled, saved, gradient))
        tile = score_gradients(rows, texts[columns], mask, temperature, *of_pairs)
        if d_patches.numel():
            accumulate(d_patches[images].view(tile.shape[0], -1), tile, texts[columns])
        if d_texts.numel():
            accumulate(d_texts[columns], tile.t(), rows.flatten(0, 1))


def score_gradients(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
    gradient: Tensor,
) -> Tensor:
    """E as [B·P, t], in the type of `texts`, which is that of `patches`; arguments as `tiles.pool_backward`'s."""
    (images, count, width), columns = patches.shape, texts.shape[0]
    patches, texts = rows_contiguous(patches, texts.dtype), rows_contiguous(texts, texts.dtype)
    # Aligned rows, for the stores and for the products.
    out = texts.new_empty((images * count, triton.cdiv(columns, 16) * 16))[:, :columns]
    arguments = {
        "patch_mask": None if patch_mask is None else patch_mask.contiguous(),
        "pooled": pooled,
        "saved": saved,
        "gradient": gradient,
        "out": out,
        "count": count,
        "columns": columns,
        "width": width,
        "image_stride": patches.stride(0),
        "patch_stride": patches.stride(1),
        "text_stride": texts.stride(0),
        "pooled_stride": pooled.stride(0),
        "saved_stride": saved.stride(0),
        "gradient_stride": gradient.stride(0),
        "out_stride": out.stride(0),
        "inverse_temperature": 1 / temperature,
    }

    def programs(tile: Tile) -> int:
        return images * triton.cdiv(count, tile.patches) * triton.cdiv(columns, tile.texts)

    def launch(tile: Tile) -> None:
        tma, features = operands(tile, patches, texts)
        softmax_gradient[(programs(tile),)](*features, **arguments, **launch_options(tile, width, tma))

    launch(choose(TILES, kind_of(patches, texts), texts.device, programs, launch))
    return out
