"""SigLipLoss against the fp64 dense loss and the real OpenCLIP (all its exchange patterns): values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cllip_fast.errors import InputError
from cllip_fast.losses import SigLipLoss
from tests import dense
from tests.openclip_peer import openclip_losses
from tests.ranks import on_ranks


def scalars(scale: float, bias: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(scale, dtype=dtype), torch.tensor([bias], dtype=dtype)]


@pytest.mark.parametrize("rows", [1, 17, 123, 507])
@pytest.mark.parametrize("chunk_size", [0, 40])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 3.0), (100.0, -60.0)])
def test_equals_dense_and_openclip(rows: int, chunk_size: int, scale: float, bias: float) -> None:
    inputs = [*dense.features(rows, 19), *scalars(scale, bias)]
    value, grads = dense.value_and_gradients(SigLipLoss(chunk_size=chunk_size), inputs, upstream=-2.5)
    for reference in (dense.siglip, openclip_losses().SigLipLoss()):
        expected, expected_grads = dense.value_and_gradients(reference, inputs, upstream=-2.5)
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


def test_without_bias_and_tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 30)
    inputs = [*dense.features(33, 5), torch.tensor([25.0], dtype=torch.float64)]
    ours = dense.value_and_gradients(SigLipLoss(chunk_size=8), inputs)
    torch.testing.assert_close(ours, dense.value_and_gradients(dense.siglip, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "one-hot", "opposite"])
def test_low_precision(dtype: torch.dtype, kind: str) -> None:
    images, texts = dense.features(61, 61, dtype)
    if kind != "random":
        images = torch.eye(61, dtype=dtype)
        texts = images if kind == "one-hot" else -images
    for scale, bias in ((10.0, -10.0), (100.0, 5.0)):
        inputs = [images, texts, *scalars(scale, bias, dtype)]
        dense.assert_as_good_as_dense(SigLipLoss(chunk_size=20), dense.siglip, inputs)


def test_each_gradient_alone_and_no_grad() -> None:
    inputs = [*dense.features(23, 8), *scalars(30.0, -4.0)]
    expected_value, expected = dense.value_and_gradients(dense.siglip, inputs)
    for index in range(4):
        leaves = [each.clone().requires_grad_(position == index) for position, each in enumerate(inputs)]
        SigLipLoss()(*leaves).backward()
        torch.testing.assert_close(leaves[index].grad, expected[index], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        loss = SigLipLoss()(*leaves, output_dict=True)["contrastive_loss"]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_value)


def test_bad_inputs() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(InputError, match=r"logit_bias has shape \[4\]"):
        SigLipLoss()(x, x, 1.0, torch.zeros(4))
    with pytest.raises(InputError, match="dist_impl is 'ring', expected one of bidir"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(InputError, match="use_horovod"):
        SigLipLoss(use_horovod=True)
    with pytest.raises(InputError, match="backend is 'cuda', expected one of auto, triton, native, torch"):
        SigLipLoss(backend="cuda")
    nan = x.clone()
    nan[1] = float("nan")
    assert SigLipLoss()(nan, x, 1.0, 0.0).isnan()


def several_ranks(rank: int, world_size: int) -> None:
    images, texts = dense.features(7 * world_size, 16)
    own = slice(7 * rank, 7 * rank + 7)
    inputs = [images[own], texts[own], *scalars(20.0, -5.0)]
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        flags = {"rank": rank, "world_size": world_size, "dist_impl": dist_impl}
        expected = dense.value_and_gradients(openclip_losses().SigLipLoss(**flags), inputs, upstream=1.0 + rank)
        for chunk_size in (0, 2 * world_size):
            loss = SigLipLoss(**flags, chunk_size=chunk_size)
            torch.testing.assert_close(dense.value_and_gradients(loss, inputs, upstream=1.0 + rank), expected)
    # Unequal rows: the mean over ranks, weighted by rows, is the full batch's.
    counts = (3, 8, 0, 5)[:world_size]
    whole = [each[: sum(counts)] for each in (images, texts)]
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    value = SigLipLoss(group=dist.group.WORLD)(whole[0][own], whole[1][own], *scalars(20.0, -5.0)) * counts[rank]
    dist.all_reduce(value)
    torch.testing.assert_close(value / sum(counts), dense.siglip(*whole, *scalars(20.0, -5.0)).squeeze())


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(world_size: int) -> None:
    on_ranks(world_size, several_ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_retained_graph(dtype: torch.dtype) -> None:
    """One pass leaves the gradients for backward, which scales them in place only if it cannot come again."""
    inputs = [each.to(dtype).requires_grad_() for each in dense.features(300, 8)]
    loss = SigLipLoss()(*inputs, torch.tensor(10.0), torch.tensor(-3.0))
    once = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    last = torch.autograd.grad(3 * loss, inputs)
    for first, second, third in zip(once, twice, last, strict=True):
        assert torch.equal(first, third)
        torch.testing.assert_close(second, first * 2 / 3)
