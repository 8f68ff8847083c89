"""Shared by all tests: few threads (ranks and workers share the cores), fixed seeds, why gpu and slow tests skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "marked gpu, and PyTorch sees no GPU here"
    if not os.environ.get("CLLIP_SLOW"):
        reasons["slow"] = "marked slow: run by `make test SLOW=1`, or with CLLIP_SLOW=1"
    for item in items:
        for mark, reason in reasons.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def coco() -> Path:
    """Real COCO photographs beside the checkout; tests on them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "coco"
    if not folder.is_dir():
        pytest.skip("the real COCO files (../shared/data/coco) are not beside this checkout")
    return folder
