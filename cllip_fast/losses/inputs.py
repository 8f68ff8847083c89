"""Checks that the losses share: pairs of features, scales, masks, and OpenCLIP's distributed arguments."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.exchange import ALONE, WORLD, Exchange, group_name


def check_pair(left: tuple[str, Tensor], right: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two (name, [n, D] features) of equal shape on one device, in the type of their product (`product_type`).

    Raises:
        InputError: not floating-point matrices, or shapes or devices differ.
    """
    check_tensor(*left, ("N", "D"), floating=True)
    check_tensor(*right, ("N", "D"), floating=True, like=left)
    if left[1].shape != right[1].shape:
        raise InputError(
            f"{left[0]} and {right[0]} must have the same shape, got {list(left[1].shape)} and {list(right[1].shape)}"
        )
    common = product_type(left[1], right[1])
    return left[1].to(common), right[1].to(common)


def product_type(left: Tensor, right: Tensor) -> torch.dtype:
    """The type in which features are multiplied: their common one; inside a GPU's autocast that of `torch.mm` there.

    `F.normalize` gives fp32 under autocast, and fp32 products take a GPU twice to ten times as long. Sums stay fp32. On
    a CPU fp32 products are the faster ones.
    """
    common, device = torch.promote_types(left.dtype, right.dtype), left.device.type
    if device == "cpu" or common == torch.float64 or not torch.is_autocast_enabled(device):
        return common
    return torch.get_autocast_dtype(device)


def check_scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A scale or bias as a tensor of one element on the device of `features`; a plain number is accepted.

    Raises:
        InputError: more than one element, an integer tensor, or another device.
    """
    if isinstance(value, int | float):
        return torch.full(
            (), float(value), dtype=torch.promote_types(features.dtype, torch.float32), device=features.device
        )
    check_tensor(name, value, floating=True, like=("the features", features))
    if value.shape not in ((), (1,)):
        raise InputError(f"{name} has shape {list(value.shape)}, expected [] or [1]")
    return value


def check_threshold(value: float | None) -> float | None:
    """A filter threshold: a cosine, or None."""
    if value is not None and not (isinstance(value, int | float) and -1 <= value <= 1):
        raise InputError(f"filter_threshold is {value!r}, expected a cosine between -1 and 1, or None")
    return None if value is None else float(value)


def resolve_group(group: dist.ProcessGroup | str | None, rank: int, world_size: int) -> tuple[str, int, int]:
    """(name, rank, world size): of `group` if there is one, else of the world if OpenCLIP's `world_size` says several.

    Raises:
        InputError: `rank` and `world_size` are not those of the initialised world, or `group` does not exist.
    """
    if group is not None:
        exchange = Exchange(group)
        return group_name(group), exchange.rank, exchange.world_size
    if world_size == 1:
        return ALONE, 0, 1
    if dist.is_available() and dist.is_initialized():
        actual = (dist.get_rank(), dist.get_world_size())
        if actual != (rank, world_size):
            raise InputError(f"rank and world_size are {rank} and {world_size}, but the process group says {actual}")
    return WORLD, rank, world_size


def refuse_horovod(use_horovod: bool) -> None:
    """Raise `InputError` if an older OpenCLIP asks for Horovod."""
    if use_horovod:
        raise InputError("use_horovod=True is not supported: run under torch.distributed")


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time a message is given in this process."""
    warnings.warn(message, UserWarning, stacklevel=4)
