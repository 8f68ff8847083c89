"""Pooling of patch–text scores on the CPU in fp32, by `csrc/`; `tiles.py` has the same functions for fp64.

A tile is one image's patches × a panel of texts, pooled in the cache; gradients follow from the tile while it is there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.kernels.patch_text import tiles
from cllip_fast.kernels.patch_text.contrast import Pairs, finite, log_sums, pooled_gradient
from cllip_fast.kernels.patch_text.tiles import saved_dtype
from cllip_fast.kernels.products import operand

__all__ = ["forward_block", "pool_backward", "pool_scores", "pooled_gradient", "saved_dtype"]

CONVERTED = 2**19
"""Numbers of half-precision patches in fp32 at a time (unless one image has more): 2 MiB."""


def forward_block(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    scale: Tensor,
    pairs: Pairs,
    pooled: Tensor,
    saved: Tensor,
    positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `tiles.forward_block`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    pool_scores(patches, texts, patch_mask, pool, temperature, pooled, saved)
    return log_sums(pooled, texts, patch_mask, scale, pairs, positive)


def pool_scores(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
) -> None:
    """Fill `pooled` and `saved`; see `tiles.pool_scores`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(texts):
        return tiles.pool_scores(patches, texts, patch_mask, pool, temperature, pooled, saved)
    for images in _spans(patches):
        part = operand(patches[images]), texts, None if patch_mask is None else patch_mask[images]
        tables = *native.table(pooled[images]), *native.table(saved[images])
        if pool == "max":
            native.call_patches("max_pool", *part, *tables, saved.element_size())
        else:
            native.call_patches("softmax_pool", *part, temperature, *tables)


def pool_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
    gradient: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> None:
    """Add the gradients of Σ gradient · pooled; see `tiles.pool_backward`.

    Raises:
        InputError: the features are not on the CPU, or the library is not built.
    """
    if not native.runs(texts):
        return tiles.pool_backward(
            patches, texts, patch_mask, pool, temperature, pooled, saved, gradient, d_patches, d_texts
        )
    pooled = finite(pooled) if pool == "softmax" else pooled
    for images in _spans(patches):
        part = operand(patches[images]), texts, None if patch_mask is None else patch_mask[images]
        given, best = native.table(gradient[images]), native.table(saved[images])
        wanted = {"d_patches": d_patches[images] if d_patches.numel() else None, "d_texts": d_texts}
        if pool == "max":
            native.call_patches("max_pool_backward", *part, *best, saved.element_size(), *given, **wanted)
        else:
            native.call_patches(
                "softmax_pool_backward",
                *part,
                temperature,
                *native.table(pooled[images]),
                *best,
                *given,
                **wanted,
            )


def _spans(patches: Tensor) -> Iterator[slice]:
    """Images that are done in one call: all of them, or few enough to convert them."""
    images, count, width = patches.shape
    step = images if operand(patches[:0]).dtype == patches.dtype else max(1, CONVERTED // (count * width))
    for start in range(0, images, max(1, step)):
        yield slice(start, min(start + step, images))
