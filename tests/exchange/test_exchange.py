"""Exchange: ragged gathers, chunk order, reduce-scatter, mismatches; one rank and several."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from cllip_fast.errors import InputError
from cllip_fast.exchange import Exchange, group_name, padding_mask
from tests.ranks import on_ranks

COUNTS = (5, 0, 7, 2)


def rows_of(rank: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (100 * rank + torch.arange(count * 3).view(count, 3)).to(dtype)


def walk(rank: int, world_size: int) -> None:
    exchange = Exchange(dist.group.WORLD)
    assert (exchange.rank, exchange.world_size) == (rank, world_size)
    counts = COUNTS[:world_size]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        local = rows_of(rank, counts[rank], dtype)
        assert exchange.row_counts(local) == counts
        kept = torch.zeros(world_size * max(counts) * 3, dtype=dtype)
        for keep in (None, kept):
            whole = torch.zeros(world_size, max(counts), 3, dtype=dtype)
            for start, chunk in exchange.gather_chunks(local, counts, 3, keep):
                whole[:, start : start + chunk.shape[1]] = chunk
            for other, count in enumerate(counts):
                assert torch.equal(whole[other, :count], rows_of(other, count, dtype))
                assert not whole[other, count:].any()
        again = [chunk for _, chunk in exchange.kept_chunks(kept, 3, counts, 3)]
        assert torch.equal(torch.cat(again, 1), whole)
        gradient = torch.stack([torch.full((4, 3), float(10 * rank + other)) for other in range(world_size)]).to(dtype)
        pending = [exchange.reduce_scatter(gradient), exchange.reduce_scatter(2 * gradient)]
        expected = sum(10 * other + rank for other in range(world_size))
        assert torch.equal(pending[0].wait(), torch.full((4, 3), float(expected)).to(dtype))
        assert torch.equal(pending[1].wait(), torch.full((4, 3), 2.0 * expected).to(dtype))
    ids = exchange.all_gather(torch.full((counts[rank],), rank), counts, fill=-1)
    mask = padding_mask(counts, ids.device)
    assert mask.sum(1).tolist() == list(counts)
    assert torch.equal(ids, torch.where(mask, torch.arange(world_size)[:, None], -1))
    flags = exchange.all_gather(torch.tensor([rank % 2 == 0]))
    assert flags[:, 0].tolist() == [other % 2 == 0 for other in range(world_size)]
    value = torch.tensor([float(rank)])
    assert exchange.all_sum(value).item() == sum(range(world_size))
    assert exchange.all_max(value).item() == world_size - 1
    assert value.item() == rank


def mismatches(rank: int, world_size: int) -> None:
    exchange = Exchange("world")
    with pytest.raises(InputError, match=r"\[2, 3\] torch.float32, \[2, 4\] torch.float32"):
        exchange.row_counts(torch.zeros(2, 3 + rank))
    with pytest.raises(InputError, match="same width and dtype"):
        exchange.row_counts(torch.zeros(2, 3, dtype=(torch.float32, torch.float64)[rank]))
    pair = dist.new_group([0])
    if rank == 0:
        assert Exchange(pair).world_size == 1
        assert Exchange(group_name(pair)).world_size == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(world_size: int) -> None:
    on_ranks(world_size, walk)


def test_mismatches_raise_on_every_rank() -> None:
    on_ranks(2, mismatches)


def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        on_ranks(2, _fail)


def test_a_hanging_or_dying_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were still running after 2 s"):
        on_ranks(2, _hang, timeout=2)
    with pytest.raises(AssertionError, match=r"exit codes \{1: 7\}|rank 0:"):
        on_ranks(2, _die)


def _hang(rank: int, world_size: int) -> None:
    time.sleep(60 * rank)


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def _fail(rank: int, world_size: int) -> float:
    return 1 / (rank - 1)


def test_one_rank_copies_nothing() -> None:
    exchange = Exchange()
    local = rows_of(0, 5)
    assert exchange.row_counts(local) == (5,)
    assert padding_mask((5,), local.device) is None
    pieces = list(exchange.gather_chunks(local, (5,), 2))
    assert [start for start, _ in pieces] == [0, 2, 4]
    assert pieces[1][1].data_ptr() == local[2].data_ptr()
    assert torch.equal(exchange.reduce_scatter(local[None]).wait(), local)
    assert list(exchange.gather_chunks(local[:0], (0,), 2)) == []


def test_a_named_group_needs_distributed() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        Exchange("world")
    with pytest.raises(InputError, match="process group or None, got int"):
        Exchange(3)
