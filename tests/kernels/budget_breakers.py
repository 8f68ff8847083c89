"""Kernels that break the budget, each in one way, to see that `ahead_of_time` notices."""

from __future__ import annotations

import triton
import triton.language as tl

from cllip_fast.kernels.tuning import CompileCase


@triton.jit
def product(left, right, out, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    rows, steps = tl.arange(0, TILE), tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, D, STEP):
        x = tl.load(left + rows[:, None] * D + start + steps)
        y = tl.load(right + rows[:, None] * D + start + steps)
        total = tl.dot(x, y.T, total)
    tl.store(out + rows[:, None] * TILE + rows, total)


def case(
    name: str, tile: int = 128, step: int = 64, warps: int = 4, stages: int = 3, aligned: bool = True, **options: int
) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=product,
        signature={"left": "*bf16", "right": "*bf16", "out": "*fp32"},
        constants={"D": 512, "TILE": tile, "STEP": step},
        divisible_by_16=("left", "right", "out") if aligned else (),
        num_warps=warps,
        num_stages=stages,
        options=options,
    )


CASES = {
    "kept": case("kept"),
    "spilled": case("spilled", maxnreg=96),
    "shared memory": case("shared memory", step=128, stages=5),
    "no wgmma": case("no wgmma", tile=64, warps=2),
    "no pipeline": case("no pipeline", aligned=False),
    "does not compile": case("does not compile", step=63),
}
