"""What the Triton kernels of patch–text share: a tile of inner products, and how a problem is cut into tiles.

    tile [L, R] = left [L, D] · right [R, D]ᵀ      D inside, BLOCK_D numbers at a time, accumulated in fp32

Half types run on tensor cores; fp32 by `input_precision="ieee"`, plain multiply-adds, so that fp32 features get fp32's
accuracy (TF32 would keep 10 bits). D and the strides are run-time arguments: where they are divisible by 16 the launch
says so to the compiler by itself, which then loads 16 bytes at a time, asynchronously. From sm_90 on the features are
loaded by TMA instead, through descriptors made on the host, unless their layout forbids it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cllip_fast.kernels.info_nce.triton_tiles import of_device


class Tile(NamedTuple):
    """One configuration: scores of so many texts × patches, `width` numbers of D at a time, and launch options."""

    texts: int
    patches: int
    width: int
    num_warps: int
    num_stages: int
    tma: bool = False  # loads by tensor descriptors, where the features allow them


Table = dict[int, dict[int, tuple[Tile, ...]]]
"""Capability -> bytes of a feature's number -> tiles, the preferred first. 0 is Triton's interpreter."""


def tile_for(table: Table, texts: Tensor, patches: int, tma: bool = False) -> Tile:
    """The first tile, of those for this device and type, that covers P patches with at most a sixth more than another.

    Patches that do not exist, but are computed, count. `tma`: whether descriptors can be had; where a device has tiles
    with and without, only those that fit are looked at.
    """
    row = of_device(table, texts.device)[texts.element_size()]
    tiles = [tile for tile in row if tile.tma == tma] or row
    covered = [triton.cdiv(patches, tile.patches) * tile.patches for tile in tiles]
    return next(tile for tile, size in zip(tiles, covered, strict=True) if 6 * size <= 7 * min(covered))


def rows_contiguous(features: Tensor, dtype: torch.dtype) -> Tensor:
    """`features` [..., D] in `dtype`, each row's numbers side by side; no copy where that is so already."""
    features = features.to(dtype)
    return features if features.stride(-1) == 1 else features.contiguous()


def operands(
    table: Table, patches: Tensor, texts: Tensor
) -> tuple[Tile, tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]]:
    """The tile for [B, P, D] and [t, D] of one type, and both as a kernel takes them: host-made descriptors for TMA.

    TMA wants addresses and strides that are multiples of 16 bytes.
    """
    tile = tile_for(table, texts, patches.shape[1], _has_descriptor(patches) and _has_descriptor(texts))
    if not tile.tma:
        return tile, (patches, texts)
    return tile, (
        TensorDescriptor.from_tensor(patches, [1, tile.patches, tile.width]),
        TensorDescriptor.from_tensor(texts, [tile.texts, tile.width]),
    )


def _has_descriptor(features: Tensor) -> bool:
    strides = (stride * features.element_size() for stride in features.stride()[:-1])
    return features.data_ptr() % 16 == 0 and all(each > 0 and each % 16 == 0 for each in strides)


@triton.jit
def described_product(
    texts,
    patches,
    column,
    image,
    patch,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TEXTS_FIRST: tl.constexpr,
):
    """Inner products of texts from `column` and patches from `patch` of `image` on, 0 beyond the last: fp32
    [BLOCK_T, BLOCK_P], or [BLOCK_P, BLOCK_T]."""
    total = tl.zeros((BLOCK_T, BLOCK_P) if TEXTS_FIRST else (BLOCK_P, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_D):
        x = texts.load([column, start])
        y = tl.reshape(patches.load([image, patch, start]), (BLOCK_P, BLOCK_D))
        if TEXTS_FIRST:
            total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        else:
            total = tl.dot(y, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit
def product(left, right, width, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """[L] and [R] pointers to the beginnings of rows -> [L, R] fp32 inner products of their `width` numbers."""
    span = tl.arange(0, BLOCK_D)
    left = left[:, None] + span[None, :]
    right = right[None, :] + span[:, None]
    total = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            x, y = tl.load(left), tl.load(right)
        else:
            inside = start + span < width
            x, y = tl.load(left, mask=inside[None, :], other=0.0), tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += BLOCK_D
        right += BLOCK_D
    return total
