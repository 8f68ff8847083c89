"""Shared by all tests: few threads (ranks and workers share the cores), fixed seeds, signals, why some tests skip."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread that could hold a lock just when a test forks
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}


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


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """The trainer's are taken back: workers that a later test forks would inherit them, and not be ended by SIGTERM."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def coco() -> Path:
    """Real COCO photographs beside the checkout; tests on them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "coco"
    if not folder.is_dir():
        pytest.skip("the real COCO files (../shared/data/coco) are not beside this checkout")
    return folder
