"""What the compiler makes of the Triton kernels for three architectures: registers, spills, tensor cores, pipeline."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.kernels.ahead_of_time import OPERATIONS, build_all, build_nvidia, document, is_default, operations

KNOWN = {("info_nce forward fp32 padded ids filtered", "sm_90")}
"""Spills 8 bytes in the best of nine tiles: fp32 with every mask, see docs/kernels_info_nce.md."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_configuration_keeps_its_budget(operation: str) -> None:
    """In bf16 and at D = 512."""
    if operation not in operations():
        pytest.skip(f"{operation} has no Triton kernels")
    check([operation], short=True)


@pytest.mark.slow
def test_the_whole_table_keeps_its_budget() -> None:
    check(operations(), short=False)


def check(chosen: list[str], short: bool) -> None:
    rows = build_all(chosen, short=short)
    print(document(rows, "now"))
    assert {(row.operation, row.target) for row in rows} == {
        (operation, target) for operation in chosen for target in ("sm_80", "sm_90", "sm_100")
    }
    known = [row for row in rows if (row.name, row.target) in KNOWN]
    assert all(row.local <= 8 and len(row.broken) <= 1 for row in known)
    assert not [row for row in rows if row.broken and row not in known]


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
    ],
)
def test_the_short_selection(name: str, chosen: bool) -> None:
    assert is_default(name) == chosen
