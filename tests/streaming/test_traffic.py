"""Bytes that cross ranks, to the byte and against OpenCLIP's; and what text gradients lose by travelling rounded."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.traffic import count_traffic, socket_bytes
from cllip_fast.losses import ClipLoss, DistillClipLoss, RegionTextLoss
from cllip_fast.streaming import plan
from tests import dense
from tests.openclip_peer import openclip_losses
from tests.ranks import on_ranks

ROWS, WIDTH = 96, 512  # of each rank


def features_bytes(world_size: int, dtype: torch.dtype) -> int:
    """What a rank receives when the features of one side are gathered once, or their gradients come home once."""
    return (world_size - 1) * ROWS * WIDTH * dtype.itemsize


def column_bytes(world_size: int) -> int:
    """Column statistics: two all-reduces, maximum and sum, of W · n fp32: 16 bytes a column of another rank."""
    return 2 * 2 * (world_size - 1) * ROWS * 4


def scalar_bytes(world_size: int, local: bool) -> float:
    """The rest, which does not grow with the batch."""
    all_reduced = 2 * (world_size - 1) / world_size
    counts, upstream = (world_size - 1) * 5 * 8, (world_size - 1) * 4
    shared_reference = all_reduced * 2 * 4
    # Each rank's own loss needs no sum; its d_scale takes a sum of W numbers. The common loss, one of each.
    return counts + upstream + shared_reference + all_reduced * 4 * (world_size if local else 2)


def settled_socket_bytes() -> tuple[int, int] | None:
    dist.barrier()
    return socket_bytes()


def bytes_of_a_step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float, tuple[int, int] | None]:
    """(sent, received, the same two by the sockets) of this rank in forward and backward."""
    before = settled_socket_bytes()
    with count_traffic() as traffic:
        dense.value_and_gradients(loss, inputs)
    after = settled_socket_bytes()
    real = before and (after[0] - before[0], after[1] - before[1])
    return traffic.sent, traffic.received, real


def clip_bytes(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")
    for dtype, local in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        inputs = [*dense.features(ROWS, WIDTH, dtype, seed=rank), torch.tensor(20.0)]
        flags = {"local_loss": local, "gather_with_grad": True, "rank": rank, "world_size": world_size}
        unit = features_bytes(world_size, dtype)
        statistics = column_bytes(world_size) + scalar_bytes(world_size, local)
        assert column_bytes(world_size) / unit == 16 / (WIDTH * dtype.itemsize)  # 0.8 % of the texts; bf16: 1.6 %

        sent, received, real = bytes_of_a_step(ClipLoss(**flags), inputs)
        peer_sent, peer_received, peer_real = bytes_of_a_step(openclip_losses().ClipLoss(**flags), inputs)
        assert sent == received == 2 * unit + statistics
        assert peer_sent == peer_received == 4 * unit
        assert received - statistics <= peer_received / 2
        if real is not None:
            assert real == pytest.approx((sent, received), rel=0.05)
            assert peer_real == pytest.approx((peer_sent, peer_received), rel=0.05)

        plan_bytes, plan.KEEP_BYTES = plan.KEEP_BYTES, 0
        assert bytes_of_a_step(ClipLoss(**flags, chunk_size=100), inputs)[1] == 3 * unit + statistics
        plan.KEEP_BYTES = plan_bytes


def other_bytes(rank: int, world_size: int) -> None:
    """Filtered regions add their ids, twice; distillation adds the teacher's texts and statistics, forward only."""
    dtype = torch.float32
    inputs = [*dense.features(ROWS, WIDTH, dtype, seed=rank), torch.tensor(20.0)]
    unit, columns, scalars = (
        features_bytes(world_size, dtype),
        column_bytes(world_size),
        scalar_bytes(world_size, False),
    )
    ids = 2 * (world_size - 1) * ROWS * 8
    region = RegionTextLoss(group=dist.group.WORLD)
    received = bytes_of_a_step(lambda *each: region(*each, group_ids=torch.arange(ROWS)), inputs)[1]
    assert received == 2 * unit + columns + scalars + ids

    teacher = dense.features(ROWS, 64, dtype, seed=9)
    flags = {"gather_with_grad": True, "rank": rank, "world_size": world_size}
    distill = DistillClipLoss(**flags)
    received = bytes_of_a_step(lambda *each: sum(distill(*each, *teacher, 30.0)), inputs)[1]
    # Five numbers a column instead of two, two losses and upstream gradients instead of one; no shared reference, and
    # nothing optional.
    scalars += 2 * (world_size - 1) / world_size * (4 - 8) + (world_size - 1) * (4 - 2 * 8)
    assert received == 2 * unit + unit * 64 / WIDTH + columns * 5 / 2 + scalars


def test_bytes_of_four_ranks() -> None:
    on_ranks(4, clip_bytes)


def test_bytes_of_masks_and_distillation() -> None:
    on_ranks(2, other_bytes)


class Average(torch.autograd.Function):
    """Identity whose gradient is the mean over ranks, as DDP does to parameters."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.double()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).to(gradient.dtype)


def precision(rank: int, world_size: int) -> None:
    """The rule of one rank holds on several, where text gradients travel in the features' type."""
    own = slice(31 * rank, 31 * rank + 31)
    for dtype, scale, local in itertools.product((torch.bfloat16, torch.float16), (14.3, 80.0), (True, False)):
        flags = {"local_loss": local, "gather_with_grad": True, "rank": rank, "world_size": world_size}
        loss = ClipLoss(**flags, chunk_size=10 * world_size)

        def on_own_rows(images: Tensor, texts: Tensor, scale: Tensor, loss: ClipLoss = loss) -> Tensor:
            images, texts, scale = map(Average.apply, (images, texts, scale))
            value = loss(images[own], texts[own], scale)
            mean = value.detach().clone()
            dist.all_reduce(mean)
            return value + (mean / world_size - value.detach())

        inputs = [*dense.features(31 * world_size, 24, dtype), torch.tensor(scale, dtype=dtype)]
        dense.assert_as_good_as_dense(on_own_rows, dense.clip, inputs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_half_precision_is_as_good_as_on_one_rank(world_size: int) -> None:
    on_ranks(world_size, precision)


def small_fp16_gradients(rank: int, world_size: int) -> None:
    """Below fp16's normal numbers before they are multiplied with the scale, but not after."""
    images, texts = dense.features(64 * world_size, 16, torch.float16)
    own, scale = slice(64 * rank, 64 * rank + 64), torch.tensor(100.0)
    exact = dense.value_and_gradients(dense.clip, [images.double(), texts.double(), scale.double()], upstream=2e-3)
    loss = ClipLoss(gather_with_grad=True, group=dist.group.WORLD)
    grads = dense.value_and_gradients(loss, [images[own], texts[own], scale], upstream=2e-3)[1]
    wanted = (world_size * exact[1][1][own]).to(torch.float16)
    torch.testing.assert_close(grads[1], wanted, rtol=4e-3, atol=1e-6)


def test_small_gradients_survive_fp16() -> None:
    on_ranks(2, small_fp16_gradients)
