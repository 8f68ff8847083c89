"""Epochs: each sample once, data sets by weight, or draws with replacement; all from (seed, epoch) alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cllip_fast.data import create_loader, load_tokenizer, read_dataset_info
from cllip_fast.data.mixture import Mixture
from cllip_fast.errors import InputError
from cllip_fast.train.config import parse
from cllip_fast.train.distributed import World
from cllip_fast.train.inputs import check_same_data, parse_weights
from tests.data.painted import jpeg, record, write_shard
from tests.ranks import on_ranks


def plain(folder, prefix, count, regions=()):
    boxes = [{"box": [2, 2, 9, 9], "text": text} for text in regions]
    write_shard(folder, [(f"{prefix}{i}", jpeg(), record(regions=boxes)) for i in range(count)])
    return folder


def keys(loader, batches):
    return [key for batch in itertools.islice(loader.forever(), batches) for key in batch.keys]


def test_an_epoch_of_one_data_set_shows_each_sample_once_in_another_order_each_time():
    mixture = Mixture([23], [1.0], seed=5)
    epochs = [mixture.epoch(number) for number in range(3)]
    for number, places in enumerate(epochs):
        assert sorted(places[:, 1]) == list(range(23))
        assert set(places[:, 0]) == {number}
    assert len({tuple(places[:, 1]) for places in epochs}) == 3
    assert np.array_equal(epochs[1], Mixture([23], [1.0], seed=5).epoch(1))
    assert not np.array_equal(epochs[1], Mixture([23], [1.0], seed=6).epoch(1))


@pytest.mark.parametrize("weights", [(1, 3), (0.5, 0.5), (20, 1)])
def test_weights_fill_their_share_of_every_epoch_in_whole_passes(weights):
    sizes = (7, 94)
    mixture = Mixture(sizes, weights, seed=0)
    shares = np.array(weights) / sum(weights)
    epochs = [mixture.epoch(number) for number in range(6)]
    for places in epochs:
        assert len(places) == len(mixture) == 101
        small = (places[:, 1] < 7).sum()
        assert abs(small - 101 * shares[0]) < 1
    together = np.concatenate(epochs)
    for first, size in ((0, 7), (7, 94)):
        mine = together[(together[:, 1] >= first) & (together[:, 1] < first + size)]
        assert np.array_equal(mine[:, 0], np.arange(len(mine)) // size), "one pass after the other, over epochs' ends"
        for whole in range(len(mine) // size):
            assert sorted(mine[whole * size : (whole + 1) * size, 1]) == list(range(first, first + size))
    halves = [(places[:50, 1] < 7).sum() for places in epochs]
    assert min(halves) > 0, "mixed, not one after the other"


def test_resampling_draws_with_replacement_in_proportion():
    mixture = Mixture((10, 3990), (1, 3), seed=0, resampled=True)
    first, second = mixture.epoch(0), mixture.epoch(1)
    assert len(first) == 4000
    assert (first[:, 1] < 10).mean() == pytest.approx(0.25, abs=0.03)
    assert len(set(first[first[:, 1] >= 10, 1])) < 3000
    assert len(set(np.concatenate([first, second])[:, 0])) == 8000, "no two draws share their crops"
    uniform = Mixture((1000,), (1,), seed=0, resampled=True).epoch(0)
    assert 580 < len(set(uniform[:, 1])) < 690, "1 - 1/e of them"


def test_a_weight_too_small_for_one_sample_is_refused():
    with pytest.raises(InputError, match=r"weights give data set 1 .* of an epoch of 20 samples"):
        Mixture([10, 10], [1, 1000], seed=0)


def test_data_sets_are_joined_without_weights_and_mixed_with_them(tmp_path, loader):
    spec = f"{plain(tmp_path / 'a', 'a', 6)}::{plain(tmp_path / 'b', 'b', 18, ['white square'])}"
    made = loader(spec, train=True, batch_size=8)
    assert sorted(keys(made, 3)) == sorted([f"a{i}" for i in range(6)] + [f"b{i}" for i in range(18)])
    mixed = loader(spec, train=True, batch_size=8, weights=[3, 1])
    assert len(mixed) == 3
    assert Counter(key[0] for key in keys(mixed, 3)) == {"a": 18, "b": 6}
    for batch in itertools.islice(mixed.forever(), 3):
        assert batch.region_mask.any(1).tolist() == [key[0] == "b" for key in batch.keys], "λ follows from the mask"
    state = mixed.state_dict()
    with pytest.raises(InputError, match="loader state has data"):
        loader(spec, train=True, batch_size=8).load_state_dict(state)
    with pytest.raises(InputError, match="loader state has data"):
        loader(spec, train=True, batch_size=8, weights=[3, 1], resampled=True).load_state_dict(state)


def test_the_same_image_twice_in_an_epoch_has_two_crops(tmp_path, loader):
    spec = f"{plain(tmp_path / 'a', 'a', 1)}::{plain(tmp_path / 'b', 'b', 19)}"
    settings = {"train": True, "batch_size": 20, "crop": "random", "max_regions": 0, "image_size": 16}
    big = jpeg(64, 64, (20, 20, 40, 40))
    write_shard(tmp_path / "a", [("a0", big, record(64, 64))])
    batch = next(loader(spec, weights=[1, 1], **settings).forever())
    seen = [tuple(image.flatten().tolist()) for image, key in zip(batch.images, batch.keys, strict=True) if key == "a0"]
    assert len(seen) == 10
    assert len(set(seen)) > 5


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1], "for 2 data sets"), ([1, 0], "positive"), ([1, float("nan")], "positive"), ([1, -2], "positive")],
)
def test_bad_weights_are_refused(tmp_path, loader, weights, message):
    spec = f"{plain(tmp_path / 'a', 'a', 6)}::{plain(tmp_path / 'b', 'b', 6)}"
    with pytest.raises(InputError, match=message):
        loader(spec, train=True, weights=weights)


def test_a_mixture_needs_samples_in_every_part(tmp_path, loader):
    plain(tmp_path / "a", "a", 6)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"no shard can be read \(1 of 1\)"):
        loader(f"{tmp_path / 'a'}::{tmp_path / 'b.tar'}", train=True, weights=[1, 1])


def test_options_reach_the_configuration(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('weights = "1,3"\nresampled = true\nflip = 0.5\n')
    config = parse(["--config", str(file)])
    assert (parse_weights(config.weights), config.resampled, config.flip) == ([1.0, 3.0], True, 0.5)
    assert parse(["--config", str(file), "--no-resampled"]).resampled is False
    assert parse(["--resampled"]).resampled is True
    assert parse_weights("") is None
    with pytest.raises(InputError, match="--weights is '1,x'"):
        parse_weights("1,x")
    file.write_text("resampled = 1\n")
    with pytest.raises(InputError, match="sets resampled to 1, expected bool"):
        parse(["--config", str(file)])


def test_the_first_data_set_that_describes_itself_is_taken(tmp_path, scene_set):
    spec = f"{plain(tmp_path / 'a', 'a', 1)}::{scene_set / 'train'}"
    assert read_dataset_info(spec).name == "scenes"


def compare_data(rank: int, world_size: int, data: list[list[str]], tokenizer: str) -> list[str]:
    """What is said of one training set with each of several to evaluate on, and of each of these to train on."""
    world, answers = World(rank, world_size, torch.device("cpu"), dist.group.WORLD), []
    loaders = [
        create_loader(
            folders[rank], tokenizer=load_tokenizer(tokenizer), batch_size=2, image_size=16, text_length=8,
            region_length=4, max_regions=0, train=True, rank=rank, world_size=world_size,
        )
        for folders in data
    ]  # fmt: skip
    for train, splits in [(loaders[0], {"val": made}) for made in loaders] + [(made, {}) for made in loaders]:
        try:
            check_same_data(train, splits, world)
            answers.append("same")
        except InputError as error:
            answers.append(str(error))
    return answers


def test_ranks_with_different_data_are_refused_on_all_of_them(tmp_path: Path, scene_set: Path) -> None:
    first, second = str(plain(tmp_path / "a", "a", 6)), str(plain(tmp_path / "b", "a", 7))
    path = str(scene_set / "tokenizer.json")
    for *same, val, again, train in on_ranks(2, compare_data, [[first, first], [first, second]], path):
        assert [*same, again] == ["same", "same"]
        for option, said in {"--val-data val": val, "--train-data": train}.items():
            assert re.match(f"{option} differs between ranks: 6 samples .* on rank 0, 7 samples .* on rank 1", said)
