"""A machine where the native kernels could not be built: the losses give the same numbers, and nothing pretends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.kernels import native
from cllip_fast.losses import ClipLoss, RegionTextLoss, SigLipLoss
from tests import dense
from tests.ranks import on_ranks

ROWS = 300
"""Too many for the plain dense form of small batches."""


def without_library(rank: int, world_size: int) -> None:
    native.LIBRARY = Path("/nowhere/libcllip_native.so")  # before anything has asked for it
    features = [*dense.features(ROWS, 16, torch.float32), torch.tensor(20.0)]
    mask, ids = torch.rand(ROWS) < 0.7, torch.randint(0, 50, (ROWS,))
    clip, siglip, region = ClipLoss(), SigLipLoss(), RegionTextLoss()
    dense.assert_as_good_as_dense(clip, dense.clip, features)
    dense.assert_as_good_as_dense(siglip, dense.siglip, [*features, torch.tensor(-5.0)])
    dense.assert_as_good_as_dense(
        lambda *each: region(*each, mask, ids), lambda *each: dense.region(*each, mask, ids, 0.9), features
    )
    reason = "no libcllip_native.so in /nowhere"
    assert not native.available()
    assert native.describe().startswith(f"native kernels: not built ({reason}")
    for loss in (ClipLoss, SigLipLoss, RegionTextLoss):
        with pytest.raises(InputError, match=f"backend is 'native', but the native kernels are not built: {reason}"):
            loss(backend="native")
    loaded = Path("/proc/self/maps")
    assert not loaded.exists() or "libcllip_native" not in loaded.read_text()


def test_without_the_library() -> None:
    on_ranks(1, without_library)
