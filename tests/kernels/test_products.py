"""Products of half precision added to fp32: inside the product where PyTorch can, apart where it refuses."""

from __future__ import annotations

import pytest
import torch

from cllip_fast.kernels import products
from tests import dense


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that the choice between the ways can be tested without one."""

    is_cuda = True


@pytest.mark.parametrize("inside", [True, False])
def test_both_ways_add_the_same(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (each.bfloat16() for each in dense.features(7, 7, torch.float32))
    total = torch.ones(7, 7).as_subclass(OnGpu)
    used = []

    def mm(left, right, out_dtype):
        used.append("mm")
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(total, left, right, out_dtype, out):
        used.append("addmm")
        return out.add_(left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(products, "adds_inside", lambda device: inside)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    products.accumulate(total, left, right)
    assert used == ["addmm" if inside else "mm"]
    torch.testing.assert_close(torch.Tensor(total), 1 + left.float() @ right.float())


def test_a_device_that_refuses_is_noticed() -> None:
    """A CPU has no product of half precision into fp32; some versions refuse it on GPUs, for fp32 sums."""
    assert not products.adds_inside(torch.device("cpu"))


def test_half_precision_on_a_cpu_is_added_in_fp32() -> None:
    left, right = (each.half() for each in dense.features(5, 5, torch.float32))
    total = torch.zeros(5, 5)
    products.accumulate(total, left, right)
    torch.testing.assert_close(total, left.float() @ right.float())


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [True, False])
def test_on_a_gpu(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (each.cuda().bfloat16() for each in dense.features(123, 64, torch.float32))
    if inside and not products.adds_inside(left.device):
        pytest.skip("this PyTorch adds no half-precision product to fp32")
    monkeypatch.setattr(products, "adds_inside", lambda device: inside)
    total = torch.ones(123, 123, device="cuda")
    products.accumulate(total, left, right.t())
    torch.testing.assert_close(total, 1 + left.float() @ right.t().float(), rtol=1e-5, atol=1e-5)
