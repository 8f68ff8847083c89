"""Checks on input: each error names the argument, the value it had and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


class InputError(ValueError):
    """An argument, file or record that cannot be used; the message says which, what it was and what was expected."""


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...] | None = None,
    *,
    floating: bool = False,
    dtype: torch.dtype | None = None,
    like: tuple[str, Tensor] | None = None,
) -> Tensor:
    """Return `value` if it is a tensor of the given form, else raise `InputError`.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: expected shape; an int must match exactly, a string such as "N" stands for any size.
        floating: require fp16, bf16, fp32 or fp64.
        dtype: require exactly this dtype.
        like: (name, tensor) whose device must be shared.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join(str(s) for s in shape) + "]"
            raise InputError(f"{name} has shape {list(value.shape)}, expected {wanted}")
    if floating and not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}, expected a floating-point type")
    if dtype is not None and value.dtype != dtype:
        raise InputError(f"{name} has dtype {value.dtype}, expected {dtype}")
    if like is not None and value.device != like[1].device:
        raise InputError(f"{name} is on {value.device}, but {like[0]} is on {like[1].device}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`, else raise `InputError` that lists them."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    return value
