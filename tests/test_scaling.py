"""The formulas of docs/scaling.md against bytes counted at the collectives, on 1, 2, 4 and (slow) 8 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling
from benchmarks.traffic import count_traffic
from cllip_fast.losses import ClipLoss
from cllip_fast.models import create_model
from cllip_fast.streaming import plan
from cllip_fast.train import distributed, parallel
from cllip_fast.train.config import Config
from tests import dense
from tests.ranks import on_ranks

ROWS, WIDTH = 24, 64


def counted(rank: int, world_size: int) -> None:
    own = dense.features(ROWS, WIDTH, torch.float32, seed=rank)
    loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    for gathers in (1, 2):
        plan.KEEP_BYTES = 2**28 if gathers == 1 else 0
        with count_traffic() as traffic:
            dense.value_and_gradients(loss, [*own, torch.tensor(20.0)])
        assert traffic.received == traffic.sent == scaling.clip_loss_bytes(ROWS, WIDTH, world_size, 4, gathers=gathers)

    model = create_model("tiny", image_size=32, vocab_size=32, text_length=8)
    wanted = scaling.fsdp_bytes(model, world_size, 4, {"visual": 1, "text": 2})
    world = distributed.World(rank, world_size, torch.device("cpu"), dist.group.WORLD)
    model = parallel.shard(model, Config(parallel="fsdp"), world, None)
    text, regions = torch.randint(1, 32, (2, 8)), torch.randint(1, 32, (2, 1, 8))
    boxes = torch.tensor([[[0.1, 0.1, 0.8, 0.8]]] * 2)
    with count_traffic() as forward:
        output = model(torch.randn(2, 3, 32, 32), text, boxes, regions, parts=("region", "grounding"))
    with count_traffic() as backward:
        sum(each.sum() for each in output.values() if isinstance(each, torch.Tensor) and each.requires_grad).backward()
    received = [
        sum(call.received for call in traffic.calls if call.name.startswith(kind))
        for traffic, kind in ((forward, "all_gather"), (backward, "all_gather"), (backward, "reduce_scatter"))
    ]
    assert received == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_formulas_are_the_counted_bytes(world_size: int) -> None:
    on_ranks(world_size, counted)


def test_one_rank_sends_nothing() -> None:
    assert scaling.clip_loss_bytes(ROWS, WIDTH, 1, 2) == 0
    assert scaling.fsdp_bytes(create_model("tiny"), 1, 2, {"visual": 1, "text": 2}) == (0, 0, 0)
    with count_traffic() as traffic:
        dense.value_and_gradients(ClipLoss(), [*dense.features(ROWS, WIDTH, torch.float32), torch.tensor(20.0)])
    assert not traffic.calls


def test_where_text_traffic_stops_hiding() -> None:
    """The document's threshold is where the two times of `plan` cross."""
    for gpus, bandwidth in ((8, scaling.DEVICE.link), (64, 50e9)):
        rows = scaling.DEVICE.bf16 / 2 / bandwidth  # (1 + 1) e F / 8 B
        texts = scaling.clip_loss_bytes(round(rows), 512, gpus, 2) / bandwidth
        products = 8 * rows * rows * gpus * 512 / scaling.DEVICE.bf16
        assert texts == pytest.approx(products, rel=0.15)


def test_the_table_has_a_line_for_each_size() -> None:
    assert len(scaling.row("ViT-B-16", 2**15, 64)) == len(scaling.HEADER)
