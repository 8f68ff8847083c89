"""The loader against a reader in plain Python that knows only what docs/data.md says (plain_reader.py)."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from cllip_fast.convert import coco as coco_format
from cllip_fast.convert import write_shards
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from tests.data import plain_reader
from tests.data.painted import record, write_shard
from tests.data.photos import encoded, photo

PADDING = [round(255 * value) for value in CLIP_MEAN]


def made_up(folder: Path, count: int = 29) -> Path:
    """Shards with sizes, boxes and texts of every kind: partly outside, whole, tiny, none."""
    rng = random.Random(1)
    samples = []
    for number in range(count):
        width, height = rng.randint(20, 400), rng.randint(20, 400)
        regions = []
        for i in range(rng.choice([0, 1, 3, 9])):
            x, y = rng.uniform(-20, width - 2), rng.uniform(-20, height - 2)
            box = [x, y, x + rng.uniform(21, width), y + rng.uniform(21, height)]
            regions.append({"box": box, "text": rng.choice(["dog", f"thing {i}", "the left one", "upright pole"])})
        captions = [f"caption {i} of {number}" for i in range(rng.randint(1, 5))]
        data = encoded(photo(width, height, seed=number), subsampling=rng.choice([0, 2]))
        samples.append((f"made/{number:04d}ü", data, record(width, height, captions=captions, regions=regions)))
    for first, (start, end) in enumerate(((0, 3), (3, 20), (20, count))):
        write_shard(folder, samples[start:end], first)
    return folder


def pixels_of(batch) -> np.ndarray:
    """Levels of 255 [B, S, S, 3] of normalised images."""
    std, mean = (np.array(values)[:, None, None] for values in (CLIP_STD, CLIP_MEAN))
    return (255 * (batch.images.double().numpy() * std + mean)).transpose(0, 2, 3, 1)


def compare(folder: Path, loader, tokenizer, *, train: bool, epochs: int = 1, **settings) -> np.ndarray:
    """Everything but pixels must be equal; returns how far pixels are apart, [samples, values]."""
    samples = plain_reader.read_shards(folder)
    made = loader(folder, train=train, batch_size=4, **settings)
    rule = {"seed": 0, "flip": 0.0, "min_kept_area": 0.5, "crop": "pad", "image_size": 64, "max_regions": 3} | settings
    batches = itertools.islice(made.forever(), epochs * len(made)) if train else iter(made)
    apart = []
    for epoch in range(epochs):
        due = plain_reader.order(rule["seed"], epoch, len(samples)) if train else list(range(len(samples)))
        due = due[: len(due) // 4 * 4] if train else due
        for start in range(0, len(due), 4):
            batch = next(batches)
            expected = [
                plain_reader.see(
                    samples[number], train=train, seed=rule["seed"], epoch=epoch, crop=rule["crop"],
                    side=rule["image_size"], most=rule["max_regions"], kept_area=rule["min_kept_area"],
                    flip=rule["flip"], padding=PADDING,
                )
                for number in due[start : start + 4]
            ]  # fmt: skip
            assert batch.keys == [seen.key for seen in expected]
            assert batch.phrases == [seen.phrases for seen in expected]
            assert batch.text.equal(tokenizer([seen.caption for seen in expected], 32))
            for i, seen in enumerate(expected):
                count = len(seen.phrases)
                assert batch.region_mask[i].tolist() == [m < count for m in range(rule["max_regions"])]
                if count:
                    np.testing.assert_allclose(batch.boxes[i, :count], seen.boxes, rtol=0, atol=1e-6)
                    assert batch.region_text[i, :count].equal(tokenizer(seen.phrases, 8))
            apart += [np.abs(ours - seen.pixels).ravel() for ours, seen in zip(pixels_of(batch), expected, strict=True)]
    assert next(batches, None) is None
    return np.stack(apart)


def check_pixels(apart: np.ndarray) -> None:
    """docs/data.md's bounds, in levels of 255."""
    assert apart.mean() <= 1.0
    assert apart.mean(1).max() <= 1.5
    assert np.percentile(apart, 99) <= 4
    assert np.percentile(apart, 99.9) <= 8


@pytest.mark.parametrize(
    "settings",
    [
        {"train": False},
        {"train": False, "crop": "center", "min_kept_area": 0.2, "image_size": 33},
        {"train": True, "epochs": 2},
        {"train": True, "epochs": 2, "crop": "random", "seed": 7, "max_regions": 5},
        {"train": True, "crop": "random", "min_kept_area": 0.9, "flip": 0.7, "image_size": 24},
    ],
    ids=str,
)
def test_generated_samples_are_seen_as_the_plain_reader_sees_them(tmp_path, loader, tokenizer, settings):
    check_pixels(compare(made_up(tmp_path), loader, tokenizer, **settings))


@pytest.fixture(scope="module")
def coco_shards(tmp_path_factory, coco):
    folder = tmp_path_factory.mktemp("coco") / "set"
    annotations = coco / "annotations"
    source = coco_format.read(annotations / "instances.json", annotations / "captions.json", coco / "images")
    write_shards(source, folder, val_share=0.1)
    return folder


@pytest.mark.parametrize("settings", [{"train": False}, {"train": True, "crop": "random", "max_regions": 8}], ids=str)
def test_photographs_are_seen_as_the_plain_reader_sees_them(coco_shards, loader, tokenizer, settings):
    check_pixels(compare(coco_shards / "val", loader, tokenizer, **settings))
