"""Windows and boxes: the same arithmetic moves pixels and boxes, and depends on seed, epoch and key only."""

import numpy as np
import pytest
import torch

from cllip_fast.data.crop import CROPS, RANDOM_AREA, Window, choose_flip, choose_window, map_box, mirror_box, reduction
from cllip_fast.errors import InputError
from tests.data.painted import jpeg, record, write_shard

KEEP = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def window(crop, width, height, size, key="k", epoch=0, seed=0):
    return choose_window(crop, width, height, size, seed=seed, epoch=epoch, key=key)


def test_pad_shows_the_whole_image_in_the_middle():
    assert window("pad", 640, 480, 64) == Window((0, 0, 640, 480), (0, 8, 64, 56))
    assert window("pad", 17, 123, 64) == Window((0, 0, 17, 123), (27, 0, 36, 64))
    assert window("pad", 1, 1000, 64).target == (31, 0, 32, 64), "a thin image keeps one pixel"


def test_center_shows_what_openclip_shows():
    # torchvision resizes to 85×64, and cuts from round(10.5) = 10 to 74 of 85
    assert window("center", 640, 481, 64) == Window((75, 0, 557, 481), (0, 0, 64, 64))
    assert window("center", 481, 640, 64) == Window((0, 75, 481, 557), (0, 0, 64, 64))
    assert window("center", 50, 50, 64) == Window((0, 0, 50, 50), (0, 0, 64, 64))
    assert window("center", 3, 1000, 64) == Window((0, 498, 3, 501), (0, 0, 64, 64))
    assert window("center", 8, 1, 64) == Window((4, 0, 5, 1), (0, 0, 64, 64)), "never empty"


def test_random_windows_lie_in_the_image_and_follow_seed_epoch_and_key():
    seen = set()
    for key in range(200):
        (x0, y0, x1, y1), target = window("random", 101, 57, 64, key=str(key))
        assert 0 <= x0 < x1 <= 101
        assert 0 <= y0 < y1 <= 57
        assert (x1 - x0) * (y1 - y0) >= 0.6 * RANDOM_AREA[0] * 101 * 57
        assert target == (0, 0, 64, 64)
        seen.add((x0, y0, x1, y1))
    assert len(seen) > 150
    base = window("random", 101, 57, 64)
    assert base == window("random", 101, 57, 64)
    assert base not in (window("random", 101, 57, 64, epoch=1), window("random", 101, 57, 64, seed=1))


@pytest.mark.parametrize(("size", "step"), [(300, 1), (100, 2), (50, 4), (20, 8), (5, 8)])
def test_random_windows_lie_on_the_pixels_of_the_smaller_picture(size, step):
    for key in range(50):
        source, _ = window("random", 1203, 901, size, key=str(key))
        width, height = source[2] - source[0], source[3] - source[1]
        factor = reduction(width, height, size, size)
        assert factor in {step, max(step // 2, 1), min(2 * step, 8)}
        assert all(edge % factor == 0 for edge in source)
        assert factor == 1 or min(width, height) >= 2 * factor * size, "still twice as fine as the square"


def test_boxes_are_clipped_scaled_and_dropped_by_kept_area():
    half = Window((10, 0, 20, 10), (0, 0, 40, 40))
    assert map_box((10, 0, 20, 10), half, 40, 0.5) == (0.0, 0.0, 1.0, 1.0)
    assert map_box((12, 2, 15, 5), half, 40, 1.0) == pytest.approx((0.2, 0.2, 0.5, 0.5))
    assert map_box((5, 0, 15, 10), half, 40, 0.5) == (0.0, 0.0, 0.5, 1.0), "exactly the share asked for stays"
    assert map_box((5, 0, 15, 10), half, 40, 0.51) is None
    assert map_box((0, 0, 10, 10), half, 40, 0.0) is None, "touching is not enough"
    padded = Window((0, 0, 100, 50), (0, 16, 64, 48))
    assert map_box((50, 0, 100, 50), padded, 64, 0.5) == (0.5, 0.25, 1.0, 0.75)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (123, 77), (77, 300), (1100, 640)])
def test_boxes_follow_the_pixels(crop, width, height, tmp_path, loader):
    """A painted rectangle is found again in the cropped image where its box says."""
    rng = np.random.default_rng(width)
    samples = []
    for i in range(6):
        x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        x1, y1 = x0 + int(rng.integers(width // 4, width // 2)), y0 + int(rng.integers(height // 4, height // 2))
        regions = [{"box": [x0, y0, x1, y1], "text": "white"}]
        samples.append((f"s{i}", jpeg(width, height, (x0, y0, x1, y1)), record(width, height, regions=regions)))
    write_shard(tmp_path, samples)
    settings = {"crop": crop, "train": crop == "random", "batch_size": 6, "min_kept_area": 0.0, **KEEP}
    made = loader(tmp_path, **settings)
    batch = next(iter(made.forever() if crop == "random" else made))
    assert batch.region_mask.sum() >= 4
    for image, box, real in zip(batch.images, batch.boxes[:, 0], batch.region_mask[:, 0], strict=True):
        if not real:
            continue
        bright = image.mean(0) > 0.5
        rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
        found = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (found - 64 * box).abs().max() <= 1.01


def test_padding_has_the_mean_colour(tmp_path, loader):
    write_shard(tmp_path, [("a", jpeg(64, 32), record(64, 32))])
    (batch,) = loader(tmp_path)
    assert batch.images[0, :, :16].abs().max() < 0.01
    assert batch.images[0, :, 17:47].max() < -1, "the black image itself"


def test_center_drops_a_region_that_is_mostly_outside(tmp_path, loader):
    regions = [{"box": [0, 0, 32, 32], "text": "left"}, {"box": [30, 0, 60, 32], "text": "middle"}]
    write_shard(tmp_path, [("a", jpeg(96, 32), record(96, 32, regions=regions))])
    (batch,) = loader(tmp_path, crop="center")
    assert batch.phrases == [["middle"]]
    assert not batch.boxes[0, 1:].any()
    assert loader(tmp_path, crop="center").skipped == {}, "that is cropping, not a fault"


def test_random_is_refused_in_evaluation(scene_set, loader):
    with pytest.raises(InputError, match="crop is 'random' with train=False"):
        loader(scene_set / "val", crop="random")
    with pytest.raises(InputError, match="crop is 'fit', expected one of pad, center, random"):
        loader(scene_set / "val", crop="fit")


# Mirroring


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a cat on the left", False),
        ("Leftmost of three", False),
        ("her right-hand glove", False),
        ("the bottom-right corner", False),
        ("topleft", False),
        ("a counterclockwise spiral", False),
        ("a bright light upright", True),
        ("copyright, cleft", True),
        ("a cat above a dog", True),
    ],
)
def test_texts_that_tell_left_from_right_are_not_mirrored(text, mirrored):
    draw = {"seed": 0, "epoch": 0, "key": "k"}
    assert choose_flip(1.0, ["a dog", text], **draw) is mirrored
    assert choose_flip(0.0, ["a dog"], **draw) is False


def test_the_share_of_mirrored_images_follows_seed_epoch_and_key():
    chosen = [choose_flip(0.3, ["a"], seed=0, epoch=e, key=str(k)) for e in range(2) for k in range(1000)]
    assert sum(chosen) == pytest.approx(600, abs=80)
    assert chosen[:1000] != chosen[1000:]
    assert chosen == [choose_flip(0.3, ["a"], seed=0, epoch=e, key=str(k)) for e in range(2) for k in range(1000)]
    assert mirror_box((0.1, 0.2, 0.4, 0.9)) == pytest.approx((0.6, 0.2, 0.9, 0.9))


def test_boxes_are_mirrored_with_the_pixels(tmp_path, loader):
    regions = [{"box": [4, 4, 20, 12], "text": "white"}]
    picture = jpeg(64, 40, (4, 4, 20, 12))
    samples = [("s", picture, record(64, 40, regions=regions)),
               ("t", picture, record(64, 40, regions=regions, captions=["right", "a picture"]))]  # fmt: skip
    write_shard(tmp_path, samples)
    settings = {"train": True, "batch_size": 2, **KEEP}
    before, after = (next(loader(tmp_path, flip=share, **settings).forever()) for share in (0.0, 1.0))
    plain = {key: i for i, key in enumerate(before.keys)}
    turned = {key: i for i, key in enumerate(after.keys)}
    assert torch.equal(after.images[turned["s"]], before.images[plain["s"]].flip(2))
    assert torch.equal(after.images[turned["t"]], before.images[plain["t"]])
    assert after.boxes[turned["s"], 0].tolist() == pytest.approx([44 / 64, 16 / 64, 60 / 64, 24 / 64])
    assert torch.equal(after.boxes[turned["t"]], before.boxes[plain["t"]])
