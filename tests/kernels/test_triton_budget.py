"""What the compiler makes of the Triton kernels for three architectures: registers, spills, tensor cores, pipeline."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from cllip_fast.kernels.tuning import LARGE
from tests.kernels.ahead_of_time import (
    OPERATIONS,
    build_all,
    build_nvidia,
    cases,
    document,
    is_default,
    operations,
    with_ones,
)

KNOWN = {("info_nce forward fp32 padded ids filtered", "sm_90")}
"""Spills 8 bytes in the best of nine tiles: fp32 with every mask, see docs/kernels_info_nce.md."""


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_configuration_keeps_its_budget(operation: str) -> None:
    """In bf16, at D = 512, with all masks."""
    if operation not in operations():
        pytest.skip(f"{operation} has no Triton kernels")
    check([operation], short=True)


@pytest.mark.slow
def test_the_whole_table_keeps_its_budget() -> None:
    check(operations(), short=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_a_search_tries_can_be_built(capability: int) -> None:
    """Within a block's shared memory; a candidate may spill: a search measures what that costs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        broken = pool.submit(broken_candidates, capability).result()
    assert not [each for each in broken if "compile" in each or "shared memory" in each]


def broken_candidates(capability: int) -> list[str]:
    """Of the InfoNCE forward, whose tiles are the largest: without masks and, if any, with all."""
    from cllip_fast.kernels.info_nce import triton_forward, triton_tiles

    signature = dict.fromkeys(("positive", "row_partials", "column_partials"), "*fp32")
    tried = {
        kind: triton_forward.TUNING.tried(capability, LARGE, kind)
        for kind in (triton_tiles.HALF, triton_tiles.HALF_MASKED)
    }
    broken = []
    for kind, configs in tried.items():
        for config in configs:
            table = {(LARGE, kind): config}
            made = triton_tiles.pair_cases(str(config), triton_forward.info_nce_forward, table, signature, {})
            for case in [each for each in made if "bf16" in each.name][-1:]:
                row = build_nvidia("candidates", case, capability)
                broken += [f"{row.name}: {each}" for each in row.broken]
    return broken


def check(chosen: list[str], short: bool) -> None:
    rows = build_all(chosen, short=short)
    print(document(rows, "now"))
    assert {(row.operation, row.target) for row in rows} == {
        (operation, target) for operation in chosen for target in ("sm_80", "sm_90", "sm_100")
    }
    known = [row for row in rows if (row.name, row.target) in KNOWN]
    assert all(row.local <= 8 and len(row.broken) <= 1 for row in known)
    assert not [row for row in rows if row.broken and row not in known]


def test_sizes_and_strides_of_one() -> None:
    """Triton makes a constant of an integer argument that is 1, which has no `.to(...)`; its interpreter does not."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        failed = pool.submit(failing_with_ones, 90).result()
    assert not failed


def failing_with_ones(capability: int) -> list[str]:
    """Kernels, each in its first case, that do not compile."""
    first = {case.kernel: case for operation in operations() for case in reversed([*cases(operation, capability)])}
    built = [build_nvidia("ones", with_ones(case), capability) for case in first.values()]
    return [f"{row.name}: {row.broken[0]}" for row in built if any("compile" in each for each in row.broken)]


def test_what_breaks_the_budget_is_noticed() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = pool.submit(built_breakers).result()
    assert rows.pop("kept") == ()
    for reason, broken in rows.items():
        assert len(broken) == 1, (reason, broken)
        assert reason in broken[0]


def built_breakers() -> dict[str, tuple[str, ...]]:
    from tests.kernels.budget_breakers import CASES

    return {reason: build_nvidia("none", case, 90).broken for reason, case in CASES.items()}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("info_nce forward bf16 D512", True),
        ("combine", True),
        ("info_nce forward fp16 D512", False),
        ("info_nce forward bf16 D64", False),
        ("info_nce backward fp32 D512", False),
        ("info_nce forward bf16 padded ids filtered", True),
        ("info_nce forward bf16 padded filtered", False),
        ("patch_text max forward bf16 128x64x32 masked", True),
        ("patch_text max forward bf16 128x64x32", False),
        ("patch_text sum_rows bf16", True),
    ],
)
def test_the_short_selection(name: str, chosen: bool) -> None:
    assert is_default(name) == chosen
