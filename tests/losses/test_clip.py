"""ClipLoss against the fp64 dense loss and the real OpenCLIP: values, gradients, odd sizes, hard inputs, bad inputs."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses import ClipLoss
from cllip_fast.losses.inputs import product_type
from tests import dense
from tests.openclip_peer import openclip_losses
from tests.ranks import on_ranks


def assert_exact(ours: object, inputs: list[Tensor], upstream: float = 1.0) -> None:
    value, grads = dense.value_and_gradients(ours, inputs, upstream)
    expected, expected_grads = dense.value_and_gradients(dense.clip, inputs, upstream)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 17, 123, 507])
@pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"chunk_size": 7}, {"chunk_size": 50}])
def test_equals_dense(rows: int, options: dict) -> None:
    images, texts = dense.features(rows, 19)
    scale = torch.tensor(23.0, dtype=torch.float64)
    assert_exact(ClipLoss(**options), [images, texts, scale], upstream=-3.5)


def test_row_tiles_smaller_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 100)
    images, texts = dense.features(123, 19)
    assert_exact(ClipLoss(chunk_size=17), [images, texts, torch.tensor([40.0], dtype=torch.float64)])


def hard_cases() -> dict[str, tuple[Tensor, Tensor]]:
    images, texts = dense.features(37, 16)
    opposite = images.clone()
    opposite[5] = -texts.sum(0) / texts.sum(0).norm()  # near −1 to everything once the texts agree
    agreeing = F.normalize(texts[:1] + 0.01 * texts, dim=1)
    opposite[5] = -agreeing[0]
    one_hot = torch.eye(37, dtype=torch.float64)
    return {
        "row whose best cosine is -1": (opposite, agreeing),
        "column whose best cosine is -1": (agreeing, opposite),
        "identical rows": (images[:1].expand(37, -1), texts),
        "all identical": (images[:1].expand(37, -1), images[:1].expand(37, -1)),
        "one-hot matches": (one_hot, one_hot),
        "shuffled one-hot": (one_hot, one_hot.roll(1, 0)),
        "large norms": (30 * images, 30 * texts),
    }


@pytest.mark.parametrize("case", hard_cases())
@pytest.mark.parametrize("scale", [1.0, 14.3, 55.0, 100.0])
def test_hard_inputs(case: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = hard_cases()[case]
    # Small tiles make the kernel leave the shared reference in the middle of a walk.
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 60)
    assert_exact(ClipLoss(chunk_size=10), [images, texts, torch.tensor(scale, dtype=torch.float64)])
    inputs = [images.float(), texts.float(), torch.tensor(scale)]
    dense.assert_as_good_as_dense(ClipLoss(chunk_size=10), dense.clip, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 123])
def test_low_precision(dtype: torch.dtype, rows: int) -> None:
    images, texts = dense.features(rows, 24, dtype)
    for scale in (torch.tensor(14.3, dtype=dtype), torch.tensor([80.0], dtype=dtype)):
        for loss in (ClipLoss(), ClipLoss(chunk_size=40)):
            dense.assert_as_good_as_dense(loss, dense.clip, [images, texts, scale])


def test_each_gradient_alone() -> None:
    inputs = [*dense.features(23, 8), torch.tensor(30.0, dtype=torch.float64)]
    _, expected = dense.value_and_gradients(dense.clip, inputs)
    for index in range(3):
        leaves = [each.clone().requires_grad_(position == index) for position, each in enumerate(inputs)]
        ClipLoss(backend="torch")(*leaves).backward()
        torch.testing.assert_close(leaves[index].grad, expected[index], rtol=1e-9, atol=1e-12)
        assert all(leaf.grad is None for position, leaf in enumerate(leaves) if position != index)


def test_bias_changes_nothing_and_has_a_zero_gradient() -> None:
    images, texts = dense.features(9, 8)
    scale, bias = torch.tensor(20.0), torch.tensor([-10.0], requires_grad=True)
    loss = ClipLoss()(images, texts, scale, bias)
    assert loss.item() == ClipLoss()(images, texts, scale).item()
    loss.backward()
    assert bias.grad.tolist() == [0.0]


def test_no_grad_dict_plain_scale_and_layout() -> None:
    images, texts = dense.features(33, 16, torch.float32)
    scale = torch.tensor(20.0)
    expected = dense.clip(images, texts, scale)
    for backend in ("auto", "torch"):
        with torch.no_grad():
            loss = ClipLoss(backend=backend)(images.requires_grad_(), texts, scale)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())
    assert set(ClipLoss()(images, texts, scale, output_dict=True)) == {"contrastive_loss"}
    torch.testing.assert_close(ClipLoss()(images, texts, 20.0), expected)
    strided = torch.stack([images.detach(), texts], 2)
    inputs = [strided[:, :, 0], texts.t().contiguous().t(), scale]
    assert not inputs[0].is_contiguous()
    torch.testing.assert_close(ClipLoss(backend="torch")(*inputs), expected.detach())


def test_rows_may_change_between_calls() -> None:
    loss = ClipLoss(cache_labels=True)
    for rows in (5, 12, 3):
        images, texts = dense.features(rows, 6)
        torch.testing.assert_close(loss(images, texts, 10.0), dense.clip(images, texts, 10.0))


def test_nan_features_give_a_nan_loss() -> None:
    images, texts = dense.features(40, 6, torch.float32)
    texts[7, 2] = float("nan")
    assert ClipLoss(chunk_size=8)(images, texts, 10.0).isnan()


def test_autocast_does_not_reach_the_tiles() -> None:
    inputs = [*dense.features(64, 16, torch.float32), torch.tensor(50.0)]
    loss = ClipLoss(backend="torch")
    expected, expected_grads = dense.value_and_gradients(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        exact = dense.clip(*(each.double() for each in inputs)).float()
        torch.testing.assert_close(ClipLoss()(*inputs), exact, rtol=1e-6, atol=0)
        value, grads = dense.value_and_gradients(loss, inputs)
    assert torch.equal(value, expected)
    assert all(map(torch.equal, grads, expected_grads))


def test_a_gpus_autocast_chooses_the_type_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.mm` would be given there; asked of tensors that only say that they are on a GPU."""
    full, half, double = (SimpleNamespace(dtype=each, device=torch.device("cuda"))
                          for each in (torch.float32, torch.float16, torch.float64))  # fmt: skip
    assert product_type(full, half) == torch.float32
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert product_type(full, full) == product_type(full, half) == torch.bfloat16
    assert product_type(full, double) == torch.float64
    cpu = torch.zeros(())
    assert product_type(cpu, cpu) == torch.float32


@pytest.mark.gpu
def test_under_a_gpus_autocast_the_loss_is_that_of_half_features() -> None:
    images, texts = (each.cuda() for each in dense.features(300, 64, torch.float32))
    expected = ClipLoss()(images.bfloat16(), texts.bfloat16(), 20.0)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(ClipLoss()(images, texts, 20.0), expected)


def test_bad_inputs() -> None:
    x = torch.zeros(4, 3)
    loss = ClipLoss()
    with pytest.raises(InputError, match=r"image_features has shape \[4\], expected \[N, D\]"):
        loss(x[:, 0], x, 1.0)
    with pytest.raises(InputError, match=r"same shape, got \[4, 3\] and \[3, 3\]"):
        loss(x, x[:3], 1.0)
    with pytest.raises(InputError, match=r"text_features has dtype torch.int64, expected a floating"):
        loss(x, x.long(), 1.0)
    with pytest.raises(InputError, match=r"text_features is on meta, but image_features is on cpu"):
        loss(x, x.to("meta"), 1.0)
    with pytest.raises(InputError, match=r"logit_scale has shape \[2\], expected \[\] or \[1\]"):
        loss(x, x, torch.ones(2))
    with pytest.raises(InputError, match="image_features must be a tensor, got list"):
        loss([1.0], x, 1.0)
    with pytest.raises(InputError, match="use_horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(InputError, match="backend is 'cuda', expected one of auto"):
        ClipLoss(backend="cuda")
    with pytest.raises(InputError, match="chunk_size is -1"):
        ClipLoss(chunk_size=-1)
    with pytest.raises(InputError, match="init_process_group"):
        ClipLoss(world_size=2, gather_with_grad=True)(x, x, 1.0)


def test_warns_once_when_the_gradient_is_not_the_full_batch() -> None:
    from cllip_fast.losses.inputs import warn_once

    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="1 / world_size"):
        ClipLoss(world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipLoss(world_size=2)
        ClipLoss(world_size=2, gather_with_grad=True)
        ClipLoss()
    with pytest.warns(UserWarning, match="wrong direction"):
        ClipLoss(world_size=2, local_loss=True)


def against_openclip(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")
    peer = openclip_losses()
    images, texts = dense.features(11 * world_size, 16)
    inputs = [images[11 * rank : 11 * rank + 11], texts[11 * rank : 11 * rank + 11], torch.tensor(30.0).double()]
    for local_loss, gather_with_grad in itertools.product([False, True], repeat=2):
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": world_size}
        expected, expected_grads = dense.value_and_gradients(peer.ClipLoss(**flags), inputs, upstream=1.7)
        for chunk_size in (None, 3 * world_size):
            loss = ClipLoss(**flags, chunk_size=chunk_size)
            value, grads = dense.value_and_gradients(loss, inputs, upstream=1.7)
            torch.testing.assert_close(value, expected, msg=lambda text, flags=flags: f"{flags}: {text}")
            for grad, reference in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, reference, msg=lambda text, flags=flags: f"{flags}: {text}")


def full_batch(rank: int, world_size: int) -> None:
    """Unequal rows, an empty rank, subgroups, gathered again, each gradient alone: all give the full batch's."""
    counts = (5, 0, 9, 2)[:world_size] if world_size > 2 else (4, 7)
    images, texts = dense.features(sum(counts), 16)
    inputs = [images, texts, torch.tensor([30.0]).double()]
    expected, expected_grads = dense.value_and_gradients(dense.clip, inputs)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    from cllip_fast.streaming import plan

    for chunk_size, budget in ((None, plan.KEEP_BYTES), (3, plan.KEEP_BYTES), (3, 0)):
        plan.KEEP_BYTES = budget
        loss = ClipLoss(gather_with_grad=True, group=dist.group.WORLD, chunk_size=chunk_size)
        value, grads = dense.value_and_gradients(loss, [images[own], texts[own], inputs[2]])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grads[0], world_size * expected_grads[0][own])
        torch.testing.assert_close(grads[1], world_size * expected_grads[1][own])
        torch.testing.assert_close(grads[2], expected_grads[2])
        alone = images[own].clone().requires_grad_()
        loss(alone, texts[own], 30.0).backward()
        torch.testing.assert_close(alone.grad, world_size * expected_grads[0][own])
    # Ranks that weigh the common loss differently: the sum of the weights counts.
    leaf = texts[own].clone().requires_grad_()
    (loss(images[own], leaf, 30.0) * (rank + 1)).backward()
    torch.testing.assert_close(leaf.grad, sum(range(1, world_size + 1)) * expected_grads[1][own])
    pairs = [dist.new_group([0]), dist.new_group(list(range(1, world_size)))]
    group = pairs[min(rank, 1)]
    members = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
    value = ClipLoss(gather_with_grad=True, group=group)(images[own], texts[own], 30.0)
    torch.testing.assert_close(value, dense.clip(images[members], texts[members], 30.0))


def two_ranks(rank: int, world_size: int) -> None:
    against_openclip(rank, world_size)
    full_batch(rank, world_size)
    with pytest.raises(InputError, match="rank and world_size are 0 and 3"):
        ClipLoss(rank=0, world_size=3, gather_with_grad=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(world_size: int) -> None:
    on_ranks(world_size, two_ranks)


def test_one_rank_equals_openclip() -> None:
    inputs = [*dense.features(29, 16), torch.tensor(30.0).double()]
    peer = openclip_losses()
    for local_loss, gather_with_grad in itertools.product([False, True], repeat=2):
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        expected = dense.value_and_gradients(peer.ClipLoss(**flags), inputs)
        value, grads = dense.value_and_gradients(ClipLoss(**flags), inputs)
        torch.testing.assert_close([value, *grads], [expected[0], *expected[1]])
