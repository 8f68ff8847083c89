"""FSDP2, DDP and activation checkpointing: two steps on two ranks are those of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cllip_fast.losses import ClipLoss, RegionTextLoss
from tests import dense
from tests.ranks import on_ranks

Loss = Callable[..., Tensor]
COUNTS = (5, 3)
"""Images on each rank: not the same number."""

REGIONS = 3
"""In an image, padding included."""


class Tower(nn.Module):
    """[..., width] -> [..., 8], unit norm."""

    def __init__(self, width: int, recompute: bool) -> None:
        super().__init__()
        self.layers, self.recompute = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 8)), recompute

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(checkpointed(self.layers, x) if self.recompute else self.layers(x), dim=-1)


class Model(nn.Module):
    """Two towers, a temperature and both losses; `recompute` checkpoints the towers and the losses."""

    def __init__(self, clip: Loss, region: Loss, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = Tower(6, recompute), Tower(5, recompute)
        self.log_scale = nn.Parameter(torch.full((1,), 2.0))  # FSDP2 refuses parameters without a dimension
        self.clip, self.region, self.recompute = clip, region, recompute
        self.double()

    def forward(
        self, images: Tensor, captions: Tensor, crops: Tensor, names: Tensor, mask: Tensor, ids: Tensor
    ) -> Tensor:
        """images [B, 6], captions [B, 5], crops [B, M, 6], names [B, M, 5], mask and ids [B, M] -> the loss []."""
        scale = self.log_scale.exp()
        whole = self.image(images), self.text(captions), scale
        parts = self.image(crops), self.text(names), scale, mask, ids
        if self.recompute:
            return checkpointed(self.clip, *whole) + checkpointed(self.region, *parts)
        return self.clip(*whole) + self.region(*parts)


def checkpointed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def batch() -> list[Tensor]:
    """The whole batch, the same on every rank."""
    torch.manual_seed(1)
    images, regions = (sum(COUNTS),), (sum(COUNTS), REGIONS)
    features = [torch.randn(*size, width).double() for size in (images, regions) for width in (6, 5)]
    return [*features, torch.rand(regions) < 0.7, torch.randint(0, 9, regions)]


def dense_region(regions: Tensor, texts: Tensor, scale: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    return dense.region(regions.flatten(0, 1), texts.flatten(0, 1), scale, mask.flatten(), ids.flatten(), 0.9)


def train(model: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(losses, gradients of the first step, weights after two steps of SGD)."""
    optimizer, losses, gradients = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), [], []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or [whole(each.grad).clone() for each in model.parameters()]
        optimizer.step()
    return losses, gradients, [whole(each.detach()) for each in model.parameters()]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded(model: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.image, model.text, model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model.image.layers[0].weight, DTensor)
    return model


def as_one_process(rank: int, world_size: int, parallel: Callable[[Model], nn.Module], recompute: bool) -> None:
    inputs, start = batch(), sum(COUNTS[:rank])
    own = [each[start : start + COUNTS[rank]] for each in inputs]
    expected = train(Model(dense.clip, dense_region), inputs)
    group = dist.group.WORLD
    model = Model(ClipLoss(gather_with_grad=True, group=group), RegionTextLoss(group=group), recompute)
    torch.testing.assert_close(train(parallel(model), own), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("parallel", [sharded, DistributedDataParallel], ids=["FSDP2", "DDP"])
def test_as_one_process(parallel: Callable[[Model], nn.Module], recompute: bool) -> None:
    on_ranks(2, as_one_process, parallel, recompute)
