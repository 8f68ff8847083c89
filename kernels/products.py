"""Matrix products of the tiles: accumulated and returned in fp32 (fp64 for fp64 input), whatever the input's type."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(features: Tensor) -> Tensor:
    """`features` in the type its products run in: half precision stays on a GPU, where tensor cores accumulate in fp32.

    On a CPU it is converted: PyTorch's half-precision product returns half precision there, and is slower.
    """
    if features.is_cuda and features.dtype in (torch.bfloat16, torch.float16):
        return features
    return features.to(accumulation_dtype(features.dtype))


def product(left: Tensor, right: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """left [n, D] · right [D, m] in `dtype`, the accumulation type, into `out` if given."""
    if left.dtype == dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def scores(rows: Tensor, columns: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out [n, m] = scale · rows [n, D] · columns [m, D]ᵀ."""
    if rows.dtype == out.dtype:
        return product(rows * scale, columns.t(), out, out.dtype)
    # Scaling half-precision rows first would round them; the tile is scaled instead.
    return product(rows, columns.t(), out, out.dtype).mul_(scale)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, D] += left [n, m] · right [m, D]; `left` is rounded to the type of `right` for tensor cores.

    The sum is taken inside the product where it can be, so that no second [n, D] is stored, written and read.
    """
    left = left.to(right.dtype)
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:  # a CPU's product of half precision has no other result than half precision
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    elif adds_inside(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


@functools.cache
def adds_inside(device: torch.device) -> bool:
    """Whether PyTorch adds a half-precision product to fp32 in one operation: some versions and devices refuse that."""
    total, half = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, half, half, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def inner(left: Tensor, right: Tensor) -> Tensor:
    """[] Σ left · right over all elements of two [n, D], in the type of `left`, without storing the n·D products."""
    rows = max(1, 2**17 // max(1, left.shape[1]))
    return torch.stack([torch.sum(a * b) for a, b in zip(left.split(rows), right.split(rows), strict=True)]).sum()
