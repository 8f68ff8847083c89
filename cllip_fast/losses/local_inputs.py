"""What the local losses ask of their input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor


def check_patches_and_texts(
    patch_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None,
    group_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check shapes, types and devices; return (texts with zeros where masked out, mask [B, T]).

    Raises:
        InputError: an argument has the wrong shape, type or device.
    """
    first = ("patch_features", patch_features)
    batch, patches, width = check_tensor("patch_features", patch_features, ("B", "P", "D"), floating=True).shape
    if patches == 0:
        raise InputError(f"patch_features has shape {list(patch_features.shape)}, expected at least one patch an image")
    check_tensor("text_features", text_features, (batch, "T", width), dtype=patch_features.dtype, like=first)
    check_tensor("logit_scale", logit_scale, floating=True, like=first)
    if logit_scale.shape not in ((), (1,)):
        raise InputError(f"logit_scale has shape {list(logit_scale.shape)}, expected [] or [1]")
    shape = text_features.shape[:2]
    if group_ids is not None:
        check_tensor("group_ids", group_ids, tuple(shape), dtype=torch.int64, like=first)
    if mask is None:
        return text_features, torch.ones(shape, dtype=torch.bool, device=text_features.device)
    check_tensor("mask", mask, tuple(shape), dtype=torch.bool, like=first)
    return text_features.masked_fill(~mask[..., None], 0), mask


def check_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return `value` if low < value <= high, else raise `InputError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        wanted = f"a number above {low:g}" if high == math.inf else f"a number in ({low:g}, {high:g}]"
        raise InputError(f"{name} is {value!r}, expected {wanted}")
    return float(value)


def check_weight(name: str, value: float) -> float:
    """Return `value` if it is a finite number of at least 0, else raise `InputError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} is {value!r}, expected a number of at least 0")
    return float(value)
