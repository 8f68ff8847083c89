"""One integer a text: equal token rows, and only those, have equal ids."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def hash_multipliers(length: int) -> Tensor:
    """Fixed odd 64-bit multipliers, one a position: [length] int64 (splitmix64, so the same on every rank and run)."""
    values = []
    for position in range(1, length + 1):
        z = (position * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z = (z ^ (z >> 31)) | 1
        values.append(z - (1 << 64) if z >> 63 else z)
    return torch.tensor(values, dtype=torch.int64)


def text_ids(tokens: Tensor, multipliers: Tensor) -> Tensor:
    """Token rows [..., L] int64 to ids [...] int64: their product with the multipliers modulo 2^64.

    Padding (id 0) adds nothing, so ids do not depend on the padded length. Two different rows share an id with a
    probability of about 2^-63, at most 2^-48 for rows whose differences have large powers of two in common.
    """
    return (tokens * multipliers[: tokens.shape[-1]]).sum(-1)
