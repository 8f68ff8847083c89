"""Checks that CLLIP's own losses share: patches with the texts of their images, masks, ids, weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.losses.inputs import product_type


def check_patches_and_texts(patch_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """[B, P, D] and [B, T, D] on one device, P at least 1, in the type of their product.

    Raises:
        InputError: wrong shapes, types that are not floating-point, or different devices.
    """
    batch, patches, width = check_tensor("patch_features", patch_features, ("B", "P", "D"), floating=True).shape
    if patches == 0:
        raise InputError(f"patch_features has shape {list(patch_features.shape)}, expected at least one patch an image")
    like = ("patch_features", patch_features)
    check_tensor("text_features", text_features, (batch, "T", width), floating=True, like=like)
    common = product_type(patch_features, text_features)
    return patch_features.to(common), text_features.to(common)


def check_mask(name: str, mask: Tensor | None, features: tuple[str, Tensor]) -> Tensor:
    """`mask` as [B, N] bool that belongs to `features` = (name, [B, N, ...]); all True for None."""
    shape = tuple(features[1].shape[:2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=features[1].device)
    return check_tensor(name, mask, shape, dtype=torch.bool, like=features)


def check_ids(ids: Tensor | None, features: tuple[str, Tensor]) -> Tensor | None:
    """`group_ids` as [B, N] int64, or None."""
    if ids is None:
        return None
    check_tensor("group_ids", ids, tuple(features[1].shape[:2]), like=features)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"group_ids has dtype {ids.dtype}, expected integers")
    return ids.to(torch.int64)


def check_weight(name: str, value: float) -> float:
    """A finite number of at least 0."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} is {value!r}, expected a number of at least 0")
    return float(value)
