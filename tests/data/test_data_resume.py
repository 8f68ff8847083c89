"""Resuming exactly: killed at any step and gone on with by other ranks and workers, an epoch shows each sample once."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import pytest

from tests.data.painted import jpeg, record, write_shard

SAMPLES, STEP = 61, 12  # five whole steps an epoch and one sample over
WORLDS = [(12, 1, 1), (3, 2, 2), (4, 3, 1), (2, 3, 2), (1, 12, 1)]  # batch_size, ranks, accum_freq: one step each


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Fewer shards than ranks."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder, [(f"k{i}", jpeg(8, 8), record(8, 8)) for i in range(20)])
    write_shard(folder, [(f"k{i}", jpeg(8, 8), record(8, 8)) for i in range(20, SAMPLES)], first=1)
    return folder


@pytest.fixture
def run(shards, loader):
    """run(world, steps, state): the keys of each step over all ranks, and rank 0's state after the last."""

    def take(world, steps, state=None, workers=0, **changes):
        batch_size, ranks, accum_freq = world
        keys, states = [[] for _ in range(steps)], []
        for rank in range(ranks):
            settings = {"train": True, "image_size": 8, "max_regions": 0, "workers": workers} | changes
            made = loader(shards, batch_size=batch_size, rank=rank, world_size=ranks, accum_freq=accum_freq, **settings)
            if state is not None:
                made.load_state_dict(pickle.loads(state))
            stream = made.forever()
            for step in range(steps):
                for _ in range(accum_freq):
                    keys[step] += next(stream).keys
            states.append(pickle.dumps(made.state_dict()))
        assert len({tuple(sorted(pickle.loads(each).items())) for each in states}) == 1, "ranks agree on where they are"
        return [sorted(step) for step in keys], states[0]

    return take


def test_every_world_takes_the_same_steps(run):
    whole, _ = run(WORLDS[0], 12)
    for epoch in (whole[:5], whole[5:10]):
        counts = Counter(itertools.chain.from_iterable(epoch))
        assert len(counts) == 5 * STEP
        assert set(counts.values()) == {1}
    for world in WORLDS[1:]:
        assert run(world, 12)[0] == whole


@pytest.mark.parametrize("resampled", [False, True])
def test_killed_at_any_step_the_rest_follows_on_any_world(run, resampled):
    whole, _ = run(WORLDS[0], 11, resampled=resampled)
    for killed, (before, after) in zip(itertools.cycle(range(8)), itertools.permutations(WORLDS, 2), strict=False):
        seen, state = run(before, killed, resampled=resampled)
        rest, _ = run(after, 11 - killed, state, resampled=resampled)
        assert seen + rest == whole, (killed, before, after)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_workers_that_had_prepared_more_lose_nothing(run, before, after):
    whole, _ = run(WORLDS[0], 7)
    seen, state = run(WORLDS[0], 3, workers=before)
    rest, _ = run(WORLDS[1], 4, state, workers=after)
    assert seen + rest == whole


@pytest.mark.parametrize("world", [(5, 2, 1), (1, 3, 2), (7, 1, 1)])
def test_with_another_step_size_the_epoch_still_shows_no_sample_twice(run, world):
    step = world[0] * world[1] * world[2]
    for killed in range(6):
        seen, state = run(WORLDS[0], killed)
        left = (SAMPLES - killed * STEP) // step
        rest, _ = run(world, left, state)
        counts = Counter(itertools.chain.from_iterable(seen + rest))
        assert set(counts.values()) <= {1}
        assert SAMPLES - len(counts) < step, "only what fills no step is left out"


def test_a_step_that_was_begun_is_taken_again(shards, loader):
    settings = {"train": True, "batch_size": 4, "accum_freq": 3, "image_size": 8}
    made = loader(shards, **settings)
    stream = made.forever()
    keys = [next(stream).keys for _ in range(6)]
    state = made.state_dict()
    assert state["samples"] == 2 * STEP
    next(stream)
    assert made.state_dict() == state, "one of three micro-batches is no step"
    again = loader(shards, **settings)
    again.load_state_dict(state)
    following = [next(stream).keys for _ in range(2)]
    repeated = [batch.keys for batch in itertools.islice(again.forever(), 3)]
    assert repeated[1:] == following
    assert not {key for batch in keys for key in batch} & {key for batch in repeated for key in batch}


def test_no_step_straddles_two_epochs(shards, loader):
    made = loader(shards, train=True, batch_size=4, accum_freq=4, image_size=8)  # three steps of 16 and 13 over
    assert len(made) == 12
    stream = made.forever()
    for _ in range(12):
        next(stream)
    assert made.state_dict()["samples"] == 48
    for _ in range(4):
        next(stream)
    assert (made.epoch, made.state_dict()["samples"]) == (1, 16)
