"""What the Triton kernels of patches and texts share: a tile's size, and its inner products from pointers.

    tile [L, R] = left [L, D] · right [R, D]ᵀ      D inside, BLOCK_D numbers at a time, accumulated in fp32

Half types run on tensor cores; fp32 by `input_precision="ieee"`, plain multiply-adds, so that fp32 features get fp32's
accuracy (TF32 would keep 10 bits). D and the strides are run-time arguments: where they are divisible by 16 the launch
says so to the compiler by itself, which then loads 16 bytes at a time, asynchronously.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """One configuration: scores of so many texts × patches, `width` numbers of D at a time, and launch options."""

    texts: int
    patches: int
    width: int
    num_warps: int
    num_stages: int
    tma: bool = False  # loads by tensor descriptors, where the features allow them


def rows_contiguous(features: Tensor, dtype: torch.dtype) -> Tensor:
    """`features` [..., D] in `dtype`, each row's numbers side by side; no copy where that is so already."""
    features = features.to(dtype)
    return features if features.stride(-1) == 1 else features.contiguous()


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
