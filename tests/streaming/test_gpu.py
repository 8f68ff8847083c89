"""The operators on a GPU: half precision with tensor cores, masks, no waiting for the device."""

from __future__ import annotations

import pytest
import torch

from cllip_fast.losses import ClipLoss, DistillClipLoss, RegionTextLoss, SigLipLoss
from tests import dense

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 507])
def test_as_good_as_dense(dtype: torch.dtype, rows: int) -> None:
    images, texts = (each.cuda() for each in dense.features(rows, 64, dtype))
    teacher = [each.cuda() for each in dense.features(rows, 32, dtype, seed=3)]
    scale, bias = torch.tensor(30.0, device="cuda"), torch.tensor([-5.0], device="cuda")
    mask, ids = torch.rand(rows, device="cuda") < 0.7, torch.randint(0, 9, (rows,), device="cuda")
    clip, siglip, region = ClipLoss(backend="torch"), SigLipLoss(backend="torch"), RegionTextLoss(backend="torch")
    distilled = DistillClipLoss(backend="torch")
    dense.assert_as_good_as_dense(clip, dense.clip, [images, texts, scale])
    dense.assert_as_good_as_dense(siglip, dense.siglip, [images, texts, scale, bias])
    dense.assert_as_good_as_dense(
        lambda *each: region(*each, mask, ids),
        lambda *each: dense.region(*each, mask, ids, 0.9),
        [images, texts, scale],
    )
    dense.assert_as_good_as_dense(
        lambda *each: distilled(*each, *(part.to(each[0].dtype) for part in teacher), 30.0)[1],
        lambda *each: dense.distill(*each, *(part.to(each[0].dtype) for part in teacher), 30.0),
        [images, texts, scale],
    )


def test_nothing_waits_for_the_device() -> None:
    images, texts = (each.cuda().requires_grad_() for each in dense.features(300, 64, torch.bfloat16))
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    mask = torch.rand(300, device="cuda") < 0.7
    torch.cuda.set_sync_debug_mode("error")
    try:
        (ClipLoss()(images, texts, scale) + RegionTextLoss()(images, texts, scale, mask)).backward()
        SigLipLoss()(images, texts, scale, None).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
