"""Tiles of images × texts whose patch scores fit a stated size, and the product that fills one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_TILE = 2**19
"""Patch scores in a tile on a CPU, at most (unless one image and one text have more): 2 MiB in fp32, for the cache."""

GPU_TILE = 2**24
"""The same on a GPU: 64 MiB in fp32, to fill the device. A kernel holds up to three tiles at a time."""


def tile_elements(on_gpu: bool) -> int:
    """Numbers that a tile may hold."""
    return GPU_TILE if on_gpu else CPU_TILE


def tile_spans(images: int, patches: int, texts: int, on_gpu: bool) -> Iterator[tuple[slice, slice]]:
    """(images, texts) of each tile; images in the outer loop."""
    budget = tile_elements(on_gpu)
    width = max(1, min(texts, budget // patches))
    height = max(1, budget // (patches * width))
    for image in range(0, images, height):
        for text in range(0, texts, width):
            yield slice(image, min(image + height, images)), slice(text, min(text + width, texts))


class ScoreBuffer:
    """One tile's memory, used again for every tile.

    Args:
        dtype: the accumulation type of the scores.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffer: Tensor | None = None

    def scores(self, patches: Tensor, texts: Tensor) -> Tensor:
        """[b, P, D] · [t, D] -> [b, P, t], accumulated in the buffer's type. Both in the products' type."""
        images, count, width = patches.shape
        elements = images * count * texts.shape[0]
        if self._buffer is None or self._buffer.numel() < elements:
            self._buffer = patches.new_empty(elements, dtype=self._dtype)
        out = self._buffer[:elements].view(images * count, texts.shape[0])
        rows = patches.reshape(images * count, width)
        if rows.dtype == out.dtype:
            torch.mm(rows, texts.t(), out=out)
        else:
            torch.mm(rows, texts.t(), out_dtype=out.dtype, out=out)
        return out.view(images, count, texts.shape[0])
