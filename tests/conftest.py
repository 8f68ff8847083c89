"""Shared by all tests: few threads (ranks and workers share the cores), fixed seeds, why GPU tests skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="marked gpu, and PyTorch sees no GPU here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


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
