"""PatchTextLoss, forward and backward, against the same loss written with one einsum. See `test_losses.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.peers import Case, shrunk

IMAGES, PATCHES, TEXTS_OF_AN_IMAGE, WIDTH = 128, 196, 4, 256


@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_patch_text(compare: Callable, pool: str) -> None:
    compare(Case(f"patch {pool}", (shrunk(IMAGES), PATCHES, TEXTS_OF_AN_IMAGE, WIDTH), scale=14.0), rounds=7)
