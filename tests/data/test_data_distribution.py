"""Every key counted: ranks, workers, shards of unequal sizes, mixtures, resuming, and a worker that is killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from cllip_fast.data.mixture import Mixture
from cllip_fast.data.order import EvaluationOrder, TrainingOrder
from tests.data.painted import jpeg, record, write_shard

SIZES = (1, 17, 2, 9, 6)  # samples in a shard
RANKS = (1, 2, 3, 4)


def shards(folder: Path, sizes: tuple[int, ...], prefix: str = "k") -> list[str]:
    """Writes shards and returns their keys."""
    keys = [f"{prefix}{i}" for i in range(sum(sizes))]
    left = iter(keys)
    for number, size in enumerate(sizes):
        write_shard(folder, [(key, jpeg(8, 8), record(8, 8)) for key in itertools.islice(left, size)], number)
    return keys


@pytest.fixture
def world(loader):
    """world(spec, ranks, workers, ...): a loader for each rank."""

    def make(spec, ranks, workers=0, **changes):
        settings = {"image_size": 8, "max_regions": 0, "text_length": 4, "workers": workers} | changes
        return [loader(spec, rank=rank, world_size=ranks, **settings) for rank in range(ranks)]

    return make


def taken(loaders, steps):
    """The keys of each step over all ranks."""
    streams = [made.forever() for made in loaders]
    return [[key for stream in streams for key in next(stream).keys] for _ in range(steps)]


@pytest.mark.parametrize("count", range(1, 6), ids="{} shards".format)
def test_ranks_and_batch_sizes_share_the_samples_out(tmp_path, world, count):
    keys = shards(tmp_path, SIZES[:count])
    for ranks, batch_size in itertools.product(RANKS, (2, 5)):
        parts = [[b.keys for b in made] for made in world(tmp_path, ranks, batch_size=batch_size)]
        assert sorted(key for part in parts for batch in part for key in batch) == sorted(keys), "evaluation: all, once"
        step = ranks * batch_size
        if step > len(keys):
            continue
        training = world(tmp_path, ranks, batch_size=batch_size, train=True)
        assert {len(made) for made in training} == {len(keys) // step}, "all ranks take the same steps"
        for epoch in range(2):
            seen = Counter(itertools.chain.from_iterable(taken(training, len(keys) // step)))
            assert set(seen.values()) == {1}
            assert len(keys) - len(seen) == len(keys) % step, "only the rest that fills no step is left out"
            assert {made.epoch for made in training} == {epoch}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 1), (2, 2)])
def test_workers_take_nothing_away(tmp_path, world, ranks, workers):
    keys = shards(tmp_path, SIZES)
    evaluated = [key for made in world(tmp_path, ranks, workers, batch_size=4) for batch in made for key in batch.keys]
    assert sorted(evaluated) == sorted(keys)
    settings = {"batch_size": 3, "train": True}
    steps = len(keys) // (3 * ranks)
    assert taken(world(tmp_path, ranks, workers, **settings), 2 * steps) == taken(
        world(tmp_path, ranks, **settings), 2 * steps
    )


def test_an_epoch_that_changes_hands_shows_each_sample_once():
    """Hundreds of epochs, each interrupted again and again and gone on with by another world."""
    rng = random.Random(0)
    for trial in range(300):
        size = rng.randint(1, 60)
        mixture = Mixture([size], [1.0], seed=trial)
        state, seen, ended = None, Counter(), False
        while not ended:
            ranks, batch_size, accum_freq = rng.choice(RANKS), rng.randint(1, 6), rng.choice([1, 1, 2])
            orders = [
                TrainingOrder(
                    mixture, batch_size, trial, data="d", tokenizer="t", accum_freq=accum_freq, rank=r, world_size=ranks
                )
                for r in range(ranks)
            ]
            if state is not None:
                for order in orders:
                    order.load_state_dict(state)
            left = (size - orders[0].consumed) // (ranks * batch_size * accum_freq)
            steps = rng.randint(0, left) if rng.random() < 0.8 else left
            streams = [iter(order) for order in orders]
            for _ in range(steps):
                for _ in range(accum_freq):
                    seen.update(number for stream in streams for _, number in next(stream))
                for order in orders:
                    order.hand_over_step()
            states = [order.state_dict() for order in orders]
            assert all(each == states[0] for each in states)
            state = states[0]
            ended = steps == left and rng.random() < 0.5
        assert set(seen.values()) <= {1}
        assert size - len(seen) < ranks * batch_size * accum_freq, "what is left out fills no step of the last world"


def test_evaluation_shares_any_number_of_samples_out():
    for samples, batch_size, ranks in itertools.product(range(1, 30), (1, 2, 5, 40), RANKS):
        orders = [EvaluationOrder(samples, batch_size, rank, ranks) for rank in range(ranks)]
        plans = [list(order) for order in orders]
        assert [len(plan) for plan in plans] == [len(order) for order in orders]
        assert sorted(n for plan in plans for batch in plan for _, n in batch) == list(range(samples))


@pytest.mark.parametrize("resampled", [False, True])
def test_a_mixture_resumes_in_another_world(tmp_path, world, resampled):
    shards(tmp_path / "a", (3, 8), "a")
    shards(tmp_path / "b", (25,), "b")
    spec = f"{tmp_path / 'a'}::{tmp_path / 'b'}"
    settings = {"train": True, "weights": [1, 2], "resampled": resampled}
    whole = taken(world(spec, 1, batch_size=6, **settings), 18)  # three epochs
    for killed, (ranks, batch_size) in zip((1, 5, 6, 11), ((3, 2), (2, 3), (1, 6), (6, 1)), strict=True):
        before = world(spec, 2, batch_size=3, **settings)
        assert taken(before, killed) == whole[:killed]
        after = world(spec, ranks, batch_size=batch_size, **settings)
        for made in after:
            made.load_state_dict(before[0].state_dict())
        assert taken(after, 18 - killed) == whole[killed:]
    if not resampled:
        counts = Counter(key for step in whole for key in step)
        for prefix, count in (("a", 36), ("b", 72)):
            mine = [n for key, n in counts.items() if key[0] == prefix]
            assert sum(mine) == count, "the weights' shares of three epochs"
            assert max(mine) - min(mine) <= 1, "whole passes"


def test_a_killed_worker_ends_the_run_and_the_rest_follows(tmp_path, world):
    keys = shards(tmp_path, (20, 20))
    settings = {"batch_size": 4, "train": True}
    whole = taken(world(tmp_path, 1, **settings), 10)
    others = {child.pid for child in multiprocessing.active_children()}
    (made,) = world(tmp_path, 1, workers=2, **settings)
    stream = made.forever()
    seen = [next(stream).keys for _ in range(3)]
    workers = {child.pid for child in multiprocessing.active_children()} - others
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker"):
        seen.extend(batch.keys for batch in itertools.islice(stream, 10))
    assert [sorted(step) for step in seen] == [sorted(step) for step in whole[: len(seen)]]
    (after,) = world(tmp_path, 1, workers=1, **settings)
    after.load_state_dict(made.state_dict())
    seen += taken([after], 10 - len(seen))
    assert Counter(itertools.chain.from_iterable(seen)) == Counter(keys)
