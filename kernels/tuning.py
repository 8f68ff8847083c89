"""What the Triton kernels' tuning tables have in common: a case that can be compiled ahead of time, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel of one tuning table's row, as it is launched on one architecture.

    Attributes:
        name: "info_nce forward bf16 D512", for tables.
        kernel: the `triton.jit` function.
        signature: argument -> Triton's type name ("*bf16", "*fp32", "i32", "i64", "fp32"), without constants.
        constants: constexpr argument -> value.
        divisible_by_16: arguments (pointers, strides, sizes) that the launch finds divisible by 16.
        num_warps, num_stages: launch options.
        options: more launch options, such as "maxnreg".
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)
