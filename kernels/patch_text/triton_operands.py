"""How the Triton kernels of patch–text get their features: the kind of tile a problem takes, and loads by TMA.

From sm_90 on features are loaded by TMA, through descriptors made on the host, unless their layout forbids it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cllip_fast.kernels.triton_patches import Tile

PATCHES = 256, 128, 64
"""Of a tile, as kinds tell them apart; a device's row for a kind may have fewer."""
HALF = tuple(f"half {patches}" for patches in PATCHES)
UNALIGNED, FULL = "half unaligned", "full"
KINDS = (*HALF, UNALIGNED, FULL)
"""Of tiles, see `kind_of`."""


def kind_of(patches: Tensor, texts: Tensor) -> str:
    """Kind of tile for [B, P, D] and [t, D] of one type: fp32, half precision that TMA cannot load, or by P.

    By P: the first of `PATCHES` that covers P with at most a sixth more than another. Patches that do not exist, but
    are computed, count.
    """
    if texts.element_size() != 2:
        return FULL
    if not (has_descriptor(patches) and has_descriptor(texts)):
        return UNALIGNED
    covered = [triton.cdiv(patches.shape[1], each) * each for each in PATCHES]
    return next(kind for kind, size in zip(HALF, covered, strict=True) if 6 * size <= 7 * min(covered))


def operands(
    tile: Tile, patches: Tensor, texts: Tensor
) -> tuple[bool, tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]]:
    """Whether TMA loads the tile, and [B, P, D] and [t, D] as a kernel then takes them."""
    if not (tile.tma and has_descriptor(patches) and has_descriptor(texts)):
        return False, (patches, texts)
    return True, (
        TensorDescriptor.from_tensor(patches, [1, tile.patches, tile.width]),
        TensorDescriptor.from_tensor(texts, [tile.texts, tile.width]),
    )


def has_descriptor(features: Tensor) -> bool:
    """Whether TMA takes the layout: addresses and strides are multiples of 16 bytes."""
    strides = (stride * features.element_size() for stride in features.stride()[:-1])
    return features.data_ptr() % 16 == 0 and all(each > 0 and each % 16 == 0 for each in strides)


def launch_options(tile: Tile, width: int, tma: bool) -> dict[str, int | bool]:
    """A tile as launch arguments, for features of `width` D."""
    return {
        "BLOCK_T": tile.texts,
        "BLOCK_P": tile.patches,
        "BLOCK_D": tile.width,
        "EVEN_D": width % tile.width == 0,
        "TMA": tma,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


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
