"""Order, ranks, workers and resuming: the batches depend on seed and state, on nothing else."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from cllip_fast.data import Batch, train_bpe
from cllip_fast.errors import InputError
from tests.data.painted import jpeg, record, write_shard

TENSORS = ("images", "text", "boxes", "region_text", "region_mask")


def take(loader, count):
    return list(itertools.islice(loader.forever(), count))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in TENSORS:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.keys, a.captions, a.phrases) == (b.keys, b.captions, b.phrases)


def joined(batches):
    """One batch of several, as the ranks of one step see them together."""
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    lists = {name: [x for b in batches for x in getattr(b, name)] for name in ("keys", "captions", "phrases")}
    return Batch(**tensors, **lists)


def test_a_batch_holds_what_the_contract_says(scene_set, loader, tokenizer):
    batches = list(loader(scene_set / "val"))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [key for batch in batches for key in batch.keys] == [f"val-{i:07d}" for i in range(10)]
    batch = batches[0]
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 64, 64), torch.float32)
    assert (batch.text.shape, batch.text.dtype) == ((4, 32), torch.int64)
    assert (batch.boxes.shape, batch.boxes.dtype) == ((4, 3, 4), torch.float32)
    assert (batch.region_text.shape, batch.region_text.dtype) == ((4, 3, 8), torch.int64)
    assert (batch.region_mask.shape, batch.region_mask.dtype) == ((4, 3), torch.bool)
    assert torch.equal(batch.text, tokenizer([captions[0] for captions in batch.captions], 32)), "the first caption"
    for i, phrases in enumerate(batch.phrases):
        assert batch.region_mask[i].tolist() == [m < len(phrases) for m in range(3)]
        assert torch.equal(batch.region_text[i, : len(phrases)], tokenizer(phrases, 8))
        assert not batch.boxes[i, len(phrases) :].any()
        assert not batch.region_text[i, len(phrases) :].any()
    boxes = batch.boxes[batch.region_mask]
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    moved = batch.to("meta")
    assert moved.images.device.type == moved.boxes.device.type == "meta"
    assert moved.keys == batch.keys


def test_images_are_normalised(tmp_path, loader):
    write_shard(tmp_path, [("a", jpeg(64, 64, (0, 0, 64, 64)), record(64, 64))])
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    (batch,) = loader(tmp_path, mean=mean, std=std)
    expected = [(1 - m) / s for m, s in zip(mean, std, strict=True)]
    np.testing.assert_allclose(batch.images.mean((0, 2, 3)), expected, atol=1e-5)


def test_evaluation_passes_are_equal_and_complete(scene_set, loader):
    made = loader(scene_set / "val", batch_size=3)
    assert len(made) == 4
    assert_equal(list(made), list(made))
    ranks = [list(loader(scene_set / "val", batch_size=3, rank=r, world_size=2)) for r in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sorted(key for batches in ranks for b in batches for key in b.keys) == [f"val-{i:07d}" for i in range(10)]


def test_an_epoch_shows_each_sample_at_most_once_and_epochs_differ(scene_set, loader):
    made = loader(scene_set / "train", train=True, batch_size=7)
    assert len(made) == 5
    batches = take(made, 10)
    first, second = ([key for batch in part for key in batch.keys] for part in (batches[:5], batches[5:]))
    assert len(set(first)) == len(set(second)) == 35
    assert first != second
    assert first != sorted(first)
    assert made.state_dict()["epoch"] == 1
    other = take(loader(scene_set / "train", train=True, batch_size=7, seed=1), 1)
    assert other[0].keys != batches[0].keys


def test_texts_and_regions_are_sampled_anew_each_epoch(tmp_path, loader):
    captions = [f"caption {i}" for i in range(4)]
    regions = [{"box": [i, i, i + 4, i + 4], "text": f"thing {i}"} for i in range(8)]
    write_shard(tmp_path, [("a", jpeg(), record(captions=captions, regions=regions))])
    batches = take(loader(tmp_path, train=True, batch_size=1), 60)
    assert len({tuple(batch.text[0].tolist()) for batch in batches}) == 4
    assert {phrase for batch in batches for phrase in batch.phrases[0]} == {f"thing {i}" for i in range(8)}
    for batch in batches:
        assert len(set(batch.phrases[0])) == 3
        for phrase, box in zip(batch.phrases[0], batch.boxes[0], strict=True):
            assert box[0].item() == pytest.approx(int(phrase[-1]) / 16)


@pytest.mark.parametrize("crop", ["pad", "random"])
def test_workers_change_nothing(scene_set, loader, crop):
    settings = {"train": True, "batch_size": 6, "crop": crop}
    assert_equal(
        take(loader(scene_set / "train", workers=0, **settings), 9),
        take(loader(scene_set / "train", workers=2, **settings), 9),
    )


def test_two_ranks_see_the_batches_of_one(scene_set, loader):
    settings = {"train": True, "crop": "random"}
    whole = take(loader(scene_set / "train", batch_size=6, **settings), 9)
    halves = [take(loader(scene_set / "train", batch_size=3, rank=r, world_size=2, **settings), 9) for r in range(2)]
    assert_equal(whole, [joined(pair) for pair in zip(*halves, strict=True)])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_exactly(scene_set, loader, workers):
    settings = {"train": True, "crop": "random"}
    made = loader(scene_set / "train", batch_size=6, workers=workers, **settings)
    stream = made.forever()
    for _ in range(8):  # into the second epoch, with batches prepared ahead when there are workers
        next(stream)
    state = pickle.loads(pickle.dumps(made.state_dict()))
    assert (state["epoch"], state["samples"]) == (1, 12)
    rest = [next(stream) for _ in range(6)]
    again = loader(scene_set / "train", batch_size=6, **settings)
    again.load_state_dict(state)
    assert_equal(rest, take(again, 6))
    pair = [loader(scene_set / "train", batch_size=3, rank=r, world_size=2, **settings) for r in range(2)]
    for one in pair:
        one.load_state_dict(state)
    assert_equal(rest, [joined(two) for two in zip(*(take(one, 6) for one in pair), strict=True)])
    made.load_state_dict(state)  # the same loader again, its workers still alive
    assert_equal(rest, take(made, 6))


def test_a_state_that_does_not_fit_is_refused(scene_set, loader):
    made = loader(scene_set / "train", train=True)
    state = made.state_dict()
    with pytest.raises(InputError, match="state has seed 3, but this loader has 0"):
        made.load_state_dict(state | {"seed": 3})
    with pytest.raises(InputError, match="state has size 39, but this loader has 40"):
        made.load_state_dict(state | {"size": 39})
    with pytest.raises(InputError, match="lacks epoch, samples, seed, size"):
        made.load_state_dict({})
    with pytest.raises(InputError, match="samples 41 of 40"):
        made.load_state_dict(state | {"samples": 41})


def test_training_and_evaluation_are_not_mixed_up(scene_set, loader):
    with pytest.raises(InputError, match=r"loader\.forever"):
        next(iter(loader(scene_set / "train", train=True)))
    with pytest.raises(InputError, match="train=False"):
        next(loader(scene_set / "train").forever())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"text_length": 0}, "text_length is 0"),
        ({"region_length": 0}, "region_length is 0"),
        ({"max_regions": -1}, "max_regions is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected less than world_size 2"),
        ({"min_kept_area": 1.5}, "min_kept_area is 1.5"),
        ({"std": (1.0, 1.0, 0.0)}, "std is"),
        ({"mean": (0.5,)}, "mean is"),
        ({"train": True, "batch_size": 21, "world_size": 2}, "holds 40 samples, expected at least one step"),
    ],
)
def test_bad_arguments_are_refused(scene_set, loader, changes, message):
    with pytest.raises(InputError, match=message):
        loader(scene_set / "train", **changes)


def test_no_region_places_is_allowed(scene_set, loader):
    batch = next(iter(loader(scene_set / "val", max_regions=0)))
    assert batch.boxes.shape == (4, 0, 4)
    assert batch.phrases == [[]] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone(scene_set, loader, workers):
    """Else a model's dropout would depend on how its data is loaded."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made = loader(scene_set / "train", train=True, workers=workers, crop="random", flip=0.5)
    list(itertools.islice(made.forever(), 3))
    list(loader(scene_set / "val", workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_state_of_another_tokenizer_is_refused(scene_set, loader):
    state = loader(scene_set / "train", train=True).state_dict()
    other = loader(scene_set / "train", train=True, tokenizer=train_bpe(["other texts"], 300))
    with pytest.raises(InputError, match=r"tokenizer json with .* ids, SHA-256 .*, but this loader has json with 2"):
        other.load_state_dict(state)
