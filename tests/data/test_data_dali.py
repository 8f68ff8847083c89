"""The DALI loader: the plain loader's batches, order, faults and state, and its pixels within a stated bound."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cllip_fast import extras
from cllip_fast.data import load_tokenizer
from cllip_fast.data.crop import CROPS, choose_window
from cllip_fast.data.dali import create_dali_loader
from cllip_fast.data.dali.encode import Encoded
from cllip_fast.data.dali.jpeg import why_not
from cllip_fast.errors import InputError
from tests.data.painted import jpeg, record, write_shard
from tests.data.photos import encoded, photo
from tests.data.test_data_decode import check_close, full
from tests.ranks import on_ranks

with_dali = pytest.mark.skipif(
    extras.probe("dali") is None, reason="DALI is not installed (pip install 'cllip-fast[dali]')"
)
TEXTS = ("text", "boxes", "region_text", "region_mask")
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # images in levels of 0 to 255
REGIONS = [{"box": [2, 2, 30, 30], "text": "a square"}]


@pytest.fixture
def dali(tokenizer):
    """`create_dali_loader` with the small defaults of the fixture `loader`."""

    def create(spec, **changes):
        settings = {
            "tokenizer": tokenizer,
            "batch_size": 4,
            "image_size": 64,
            "text_length": 32,
            "region_length": 8,
            "max_regions": 3,
            "train": False,
            "threads": 2,
        }
        return create_dali_loader(spec, **settings | changes)

    return create


def take(loader, count):
    return list(itertools.islice(loader.forever(), count))


def assert_same(found, expected, levels=1.0):
    """Everything but pixels equal; these within `levels` of 255 in the mean of an image."""
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.captions, a.phrases) == (b.captions, b.phrases)
        for name in TEXTS:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.images.shape == b.images.shape
        error = (a.images.float() - b.images).abs().mean((1, 2, 3)) * 255 * 0.27  # CLIP's std of the channels
        assert error.max() <= levels, (a.keys, error)


def photos(count, start=0, **options):
    samples = []
    for i in range(start, start + count):
        width, height = 90 + 13 * (i % 7), 70 + 17 * (i % 5)
        picture = encoded(photo(width, height, i), **options)
        samples.append((f"p{i}", picture, record(width, height, regions=REGIONS, captions=[f"picture {i}", "other"])))
    return samples


def bad_tables(seed=0):
    """A JPEG whose header and end are as they should be, and whose Huffman tables nobody can use."""
    data = bytearray(encoded(photo(100, 80, seed)))
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def refusing(monkeypatch, keys):
    """Make DALI, and nobody else, fail over these samples."""
    run = Encoded.run

    def spoiled(self, rows, side):
        made = run(self, rows, side)
        for place, row in enumerate(rows):
            if self.batch.keys[row] in keys and row not in self.rows:
                made.files[place] = np.frombuffer(b"\xff\xd8 no picture \xff\xd9", dtype=np.uint8)
        return made

    monkeypatch.setattr(Encoded, "run", spoiled)


# Batches


@with_dali
@pytest.mark.parametrize(("crop", "resampled"), [*((crop, False) for crop in CROPS), ("random", True)])
def test_training_batches_are_the_plain_loaders(scene_set, loader, dali, crop, resampled):
    settings = {"train": True, "batch_size": 6, "crop": crop, "flip": 0.5, "weights": [3, 1], "resampled": resampled}
    spec = f"{scene_set / 'train'}::{scene_set / 'val'}"
    made = dali(spec, **settings)
    assert_same(take(made, 12), take(loader(spec, **settings), 12))
    assert made.by_pillow == {}, "all of it by DALI"
    assert made.decoder.startswith("dali ")


@with_dali
def test_evaluation_batches_are_the_plain_loaders(scene_set, loader, dali):
    made = dali(scene_set / "val")
    assert len(made) == 3
    for _ in range(2):
        assert_same(list(made), list(loader(scene_set / "val")))
    ranks = {"batch_size": 3, "world_size": 2}
    for rank in range(2):
        assert_same(
            list(dali(scene_set / "val", rank=rank, **ranks)), list(loader(scene_set / "val", rank=rank, **ranks))
        )


@with_dali
def test_workers_and_runs_change_nothing(tmp_path, dali):
    write_shard(tmp_path, photos(20))
    settings = {"train": True, "batch_size": 7, "crop": "random", "flip": 0.5}
    whole = take(dali(tmp_path, **settings), 5)
    pixels = 200 * 200
    small = {"max_decoded_pixels": pixels, "decode_memory": 2 * 3 * pixels + 1}
    for changes in ({"workers": 2}, small, small | {"workers": 2}):
        for a, b in zip(take(dali(tmp_path, **settings, **changes), 5), whole, strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.images, b.images), "the same bits"


@with_dali
def test_batches_live_on_after_the_loader(tmp_path, dali):
    write_shard(tmp_path, photos(12))
    made = dali(tmp_path, train=True)
    state = made.state_dict()
    batches = take(made, 9)
    copies = [batch.images.clone() for batch in batches]
    made.load_state_dict(state)
    again = take(made, 9)
    del made
    for batch, copy, repeated in zip(batches, copies, again, strict=True):
        assert torch.equal(batch.images, copy), "DALI has not used the memory again"
        assert torch.equal(batch.images, repeated.images)
        batch.images.add_(1)


# Pixels


def check_dali_close(difference):
    """The bounds that `create_dali_loader` states, in levels of 255, of [image, rows, columns, 3]."""
    assert difference.mean((1, 2, 3)).max() <= 0.5, "of any one image"
    assert np.percentile(difference, 99) <= 3
    assert np.percentile(difference, 99.9) <= 10


@with_dali
@pytest.mark.parametrize("side", [64, 224])
def test_photographs_stay_within_the_same_bounds(tmp_path, coco, dali, side):
    paths = sorted((coco / "images").glob("*.jpg"))[::40]
    sizes = {path.stem: Image.open(path).size for path in paths}
    write_shard(tmp_path, [(path.stem, path.read_bytes(), record(*sizes[path.stem])) for path in paths])
    settings = LEVELS | {"crop": "random", "image_size": side, "batch_size": len(paths), "train": True}
    batch = next(dali(tmp_path, **settings).forever())
    files = {path.stem: path.read_bytes() for path in paths}
    windows = [choose_window("random", *sizes[key], side, seed=0, epoch=0, key=key) for key in batch.keys]
    expected = [full(files[key], window, side) for key, window in zip(batch.keys, windows, strict=True)]
    check_dali_close(np.abs(batch.images.permute(0, 2, 3, 1).numpy() - np.stack(expected)))


@with_dali
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("side", "sizes"), [(24, [(500, 375), (333, 517)]), (96, [(500, 375), (1203, 901), (61, 53)])])
def test_pixels_agree_with_full_pillow(tmp_path, dali, loader, crop, side, sizes):
    files = [encoded(photo(*size, seed), subsampling=seed % 3) for seed, size in enumerate(sizes)]
    files[-1] = encoded(photo(*sizes[-1]), progressive=True)
    write_shard(tmp_path, [(str(i), file, record(*sizes[i])) for i, file in enumerate(files)])
    settings = LEVELS | {"crop": crop, "image_size": side, "batch_size": len(files), "train": crop == "random"}
    made, plain = dali(tmp_path, **settings), loader(tmp_path, **settings)
    batch, other = (next(iter(each.forever() if crop == "random" else each)) for each in (made, plain))
    found = batch.images.permute(0, 2, 3, 1).numpy()
    expected = []
    for key in batch.keys:
        window = choose_window(crop, *sizes[int(key)], side, seed=0, epoch=0, key=key)
        expected.append(full(files[int(key)], window, side))
    difference = np.abs(found - np.stack(expected))
    check_dali_close(difference)
    if crop != "pad":
        assert difference[:, 4:-4, 4:-4].max() <= 5, "the largest are at the edges"
    check_close(np.abs(found - other.images.permute(0, 2, 3, 1).numpy()).reshape(len(files), -1))


@with_dali
def test_drawn_pictures_agree_with_the_plain_loader(scene_set, dali, loader):
    settings = LEVELS | {"batch_size": 10}
    (batch,), (plain,) = dali(scene_set / "val", **settings), loader(scene_set / "val", **settings)
    check_close((batch.images - plain.images).abs().reshape(10, -1).numpy())


@with_dali
def test_pictures_lie_in_their_place_with_the_padding_of_the_plain_loader(tmp_path, dali, loader):
    sizes = [(640, 481), (17, 123), (1, 1000), (1000, 1), (64, 64), (1, 1), (63, 64), (5, 3)]
    samples = [(f"{w}x{h}", encoded(np.full((h, w, 3), 200, dtype=np.uint8)), record(w, h)) for w, h in sizes]
    write_shard(tmp_path, samples)
    for side in (64, 67):
        settings = {"batch_size": len(sizes), "image_size": side, "train": True, "flip": 1.0}
        batch, plain = (next(each(tmp_path, **settings).forever()) for each in (dali, loader))
        assert batch.keys == plain.keys
        assert (batch.images - plain.images).abs().max() <= 1.5 / 255 / 0.26, "one level of rounding"
        padded = plain.images.abs() < 0.5 / 255 / 0.26  # within half a level of the mean, as no picture here is
        assert padded.any()
        torch.testing.assert_close(batch.images[padded], plain.images[padded], atol=1e-5, rtol=0)


# Kinds of files


@with_dali
def test_what_is_no_plain_jpeg_goes_through_pillow_in_the_same_batch(tmp_path, dali, loader):
    picture = Image.fromarray(photo(90, 70))
    exif = Image.Exif()
    exif[0x112] = 6
    kinds = {
        "png": encoded(picture, "PNG"),
        "palette": encoded(picture.convert("P"), "PNG"),
        "16bit": encoded(Image.fromarray(photo(90, 70)[..., 0].astype(np.uint16) << 8), "PNG"),
        "cmyk": encoded(picture.convert("CMYK")),
        "rgb": encoded(picture, keep_rgb=True),
        "trailing": encoded(picture) + b"\0\0",
        "large": encoded(photo(300, 200)),
        "grey": encoded(picture.convert("L")),
        "progressive": encoded(picture, progressive=True),
        "turned": encoded(picture, exif=exif),
        "plain": encoded(picture, subsampling=0),
    }
    sizes = {name: (300, 200) if name == "large" else (90, 70) for name in kinds}
    write_shard(tmp_path, [(name, data, record(*sizes[name])) for name, data in kinds.items()])
    settings = {"train": True, "batch_size": len(kinds), "flip": 0.5}
    made = dali(tmp_path, max_decoded_pixels=90 * 70, **settings)
    (batch,), (plain,) = take(made, 1), take(loader(tmp_path, **settings), 1)
    assert_same([batch], [plain])
    expected = {
        "not a JPEG": 3,
        "CMYK or RGB JPEG": 2,
        "no end mark": 1,
        "large": 1,
    }
    assert made.by_pillow == expected
    for row, key in enumerate(batch.keys):
        if key in list(kinds)[:7]:
            torch.testing.assert_close(batch.images[row], plain.images[row], atol=1e-6, rtol=0)


def test_headers_are_read(scene_set):
    assert why_not(encoded(photo(50, 40)), (50, 40)) is None
    assert why_not(encoded(photo(50, 40), progressive=True), (50, 40)) is None
    assert why_not(encoded(Image.fromarray(photo(50, 40)).convert("L")), (50, 40)) is None
    assert why_not(encoded(photo(50, 40), exif=b"Exif\0\0" + encoded(photo(20, 20))), (50, 40)) is None, "a thumbnail"
    assert why_not(encoded(photo(50, 40)), (40, 50)) == "size differs from record"
    data = encoded(photo(50, 40))
    frame = data.index(b"\xff\xc0")
    for marker, bits in ((0xC3, 8), (0xC9, 8), (0xC1, 12)):
        changed = data[:frame] + bytes([0xFF, marker]) + data[frame + 2 : frame + 4] + bytes([bits]) + data[frame + 5 :]
        assert why_not(changed, (50, 40)) == "arithmetic, lossless or 12-bit JPEG"
    assert why_not(data[:frame] + b"\xff\xff\xff" + data[frame:], (50, 40)) is None, "fill bytes"
    scan = data.index(b"\xff\xda") + 40
    for between in (b"\xff\x00", b"\xff\xd3"):
        assert why_not(data[:scan] + between + data[scan:], (50, 40)) is None, "a scan's own"
    for name, between in {"end": b"\xff\xd9", "frame": data[frame : frame + 19], "reserved": b"\xff\x02"}.items():
        assert why_not(data[:scan] + between + data[scan:], (50, 40)) == "markers out of order", name
    assert why_not(data[: data.index(b"\xff\xda")] + b"\xff\xd9", (50, 40)) == "markers out of order", "no scan"


def test_no_header_is_too_broken_to_be_told_so():
    data, rng = encoded(photo(50, 40)), np.random.default_rng(0)
    for cut in range(0, 700, 3):
        assert why_not(data[:cut], (50, 40)) is not None
        assert why_not(data[:cut] + b"\xff\xd9", (50, 40)) is not None or cut > data.index(b"\xff\xc0") + 2
    for _ in range(500):
        spoiled = np.frombuffer(data, dtype=np.uint8).copy()
        spoiled[rng.integers(0, 700, 8)] = rng.integers(0, 256, 8)
        why_not(spoiled.tobytes(), (50, 40))


# Types and layout


@with_dali
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_types_and_layouts(tmp_path, dali, dtype, channels_last):
    write_shard(tmp_path, photos(3) + [("png", encoded(photo(64, 64), "PNG"), record(64, 64))])
    (expected,) = dali(tmp_path)
    (batch,) = dali(tmp_path, dtype=dtype, channels_last=channels_last)
    assert batch.images.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=layout)
    torch.testing.assert_close(batch.images, expected.images.to(dtype), atol=1e-6, rtol=1e-3)


# Resuming


@with_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_exactly_with_either_loader(tmp_path, dali, loader, workers):
    write_shard(tmp_path, photos(23))
    settings = {"train": True, "crop": "random", "flip": 0.5, "accum_freq": 2}
    made = dali(tmp_path, batch_size=4, workers=workers, **settings)
    stream = made.forever()
    for _ in range(7):  # one batch into a step of the second epoch, and one more under way
        next(stream)
    state = pickle.loads(pickle.dumps(made.state_dict()))
    assert (state["epoch"], state["samples"]) == (1, 8)
    rest = [next(stream) for _ in range(5)][1:]
    again = dali(tmp_path, batch_size=4, **settings)
    again.load_state_dict(state)
    for a, b in zip(take(again, 6)[2:], rest, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
    plain = loader(tmp_path, batch_size=4, **settings)
    plain.load_state_dict(state)
    assert_same(rest, take(plain, 6)[2:])
    halves = [dali(tmp_path, batch_size=2, rank=rank, world_size=2, **settings) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    pairs = zip(*(take(half, 6)[2:] for half in halves), strict=True)
    assert [a.keys + b.keys for a, b in pairs] == [batch.keys for batch in rest]


def keys_of_a_rank(rank, world_size, folder, tokenizer, steps, state):
    """Keys of `steps` steps of twelve samples over all ranks, and the state after them."""
    made = create_dali_loader(
        folder, tokenizer=load_tokenizer(tokenizer), batch_size=12 // world_size, image_size=16, text_length=8,
        region_length=4, max_regions=1, train=True, rank=rank, world_size=world_size, threads=1,
    )  # fmt: skip
    if state is not None:
        made.load_state_dict(state)
    return [batch.keys for batch in itertools.islice(made.forever(), steps)], made.state_dict()


@with_dali
@pytest.mark.slow
def test_two_ranks_visit_each_sample_once_and_three_take_over(tmp_path, scene_set):
    write_shard(tmp_path, photos(48))
    arguments = str(tmp_path), str(scene_set / "tokenizer.json")
    first = on_ranks(2, keys_of_a_rank, *arguments, 2, None)
    state = first[0][1]
    assert first[1][1] == state
    rest = [keys_of_a_rank(rank, 3, *arguments, 2, state) for rank in range(3)]
    counts = Counter(key for keys, _ in first + rest for batch in keys for key in batch)
    assert len(counts) == 48
    assert set(counts.values()) == {1}


# Faults

BROKEN = [
    ("b0", jpeg()[:300], record(), "broken image"),
    ("b1", b"no picture", record(), "broken image"),
    ("b2", jpeg(20, 20), record(), "size differs from record"),
    ("b3", jpeg(2000, 60), record(2000, 60), "too many pixels"),
    ("b4", jpeg(), record(captions=[]), "no caption"),
    ("b5", bad_tables(), record(100, 80), "broken image"),
    ("b6", bad_tables(1), record(100, 80), "broken image"),
    ("b7", b"", record(), "broken image"),
]


@with_dali
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 11])
def test_broken_samples_are_replaced_and_counted_as_in_the_plain_loader(tmp_path, dali, loader, workers, batch_size):
    write_shard(tmp_path, photos(14) + [entry[:3] for entry in BROKEN])
    settings = {"train": True, "batch_size": batch_size, "max_pixels": 100_000, "max_broken": 1.0}
    pixels = 120_000
    made = dali(tmp_path, workers=workers, max_decoded_pixels=pixels, decode_memory=4 * 3 * pixels, **settings)
    plain = loader(tmp_path, **settings)
    batches = 44 // batch_size
    assert_same(take(made, batches), take(plain, batches))
    assert made.counts == plain.counts
    assert made.counts["samples_skipped"] > 0
    assert made.skipped == plain.skipped


@with_dali
def test_broken_samples_are_left_out_of_evaluation(tmp_path, dali, loader):
    write_shard(
        tmp_path, [BROKEN[5][:3]] * 1 + photos(5) + [BROKEN[6][:3], BROKEN[0][:3], BROKEN[1][:3], BROKEN[7][:3]]
    )
    for batch_size in (1, 2, 3, 10):
        made, plain = dali(tmp_path, batch_size=batch_size), loader(tmp_path, batch_size=batch_size)
        for _ in range(2):
            assert_same(list(made), list(plain))
        assert made.counts == plain.counts
        assert made.skipped == plain.skipped == {"broken image": 10}


def damaged(data, rng):
    """A file with some bytes changed, its end cut off but for the mark, or a run of other bytes in place of one."""
    data, kind = bytearray(data), rng.integers(4)
    if kind == 0:
        data = data[: rng.integers(600, len(data))] + b"\xff\xd9"
    elif kind == 1:
        start = rng.integers(600, len(data) - 200)
        data[start : start + rng.integers(150)] = rng.bytes(rng.integers(150))
    else:
        for place in rng.integers(2, 700 if kind == 2 else len(data), 2):
            data[place] = rng.integers(256)
    return bytes(data)


@with_dali
@pytest.mark.parametrize("crop", ["pad", "random"])
def test_random_damage_leaves_out_the_samples_that_the_plain_loader_leaves_out(tmp_path, dali, loader, crop):
    """Where damage makes a marker in a scan, libjpeg refuses what DALI, done with its window, would take."""
    rng, kinds = np.random.default_rng(0), [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}]
    files = [damaged(encoded(photo(100, 80, i), **kinds[i % 4]), rng) for i in range(60)]
    write_shard(tmp_path, [(f"d{i}", file, record(100, 80)) for i, file in enumerate(files)])
    settings = {"train": True, "batch_size": 6, "crop": crop, "max_broken": 1.0}
    made, plain = dali(tmp_path, **settings), loader(tmp_path, **settings)
    assert_same(take(made, 10), take(plain, 10), levels=2.0)
    assert made.counts == plain.counts
    assert made.skipped == plain.skipped
    assert 5 < made.counts["samples_skipped"] < 30
    assert sum(made.by_pillow.values()) < 10, "most is DALI's"


@with_dali
def test_what_only_dali_refuses_is_decoded_by_pillow(tmp_path, dali, loader, monkeypatch, caplog):
    write_shard(tmp_path, photos(16))
    refusing(monkeypatch, {"p3", "p4", "p11"})
    made = dali(tmp_path, train=True)
    with caplog.at_level(logging.WARNING, logger="cllip_fast.data"):
        assert_same(take(made, 12), take(loader(tmp_path, train=True), 12))
    assert made.by_pillow == {"refused by DALI": 9}, "three samples, three epochs"
    assert made.skipped == {}
    assert 1 <= len([line for line in caplog.records if "DALI refuses" in line.getMessage()]) <= 3, "found once each"


@with_dali
def test_a_dali_that_decodes_nothing_ends_the_run_with_its_own_error(tmp_path, dali, monkeypatch):
    from cllip_fast.data.dali import batches, encode

    write_shard(tmp_path, photos(8))
    nothing = encode.stand_in_run()
    nothing.files[0] = np.zeros(9, dtype=np.uint8)
    monkeypatch.setattr(batches, "stand_in_run", lambda: nothing)
    refusing(monkeypatch, {f"p{i}" for i in range(8)})
    with pytest.raises(RuntimeError, match="decode"):
        next(dali(tmp_path, train=True).forever())


@with_dali
def test_training_on_nothing_but_broken_images_stops(tmp_path, dali):
    write_shard(tmp_path, [(f"x{i}", bad_tables(i), record(100, 80)) for i in range(4)])
    with pytest.raises(InputError, match=r"100 samples in a row cannot be used; last .*000000\.tar: x"):
        next(dali(tmp_path, train=True).forever())


# Processes


@with_dali
def test_workers_stop_at_once_and_may_start_while_a_pipeline_runs(tmp_path, dali):
    write_shard(tmp_path, [*photos(9), BROKEN[5][:3]])
    before, evaluated = set(multiprocessing.active_children()), dali(tmp_path, workers=1)
    gc.disable()
    try:
        training = dali(tmp_path, train=True, workers=1, max_broken=1.0)
        stream = training.forever()
        for _ in range(8):
            next(stream)
        assert training.skipped["broken image"] > 0, "a pipeline has failed and was replaced"
        assert len(list(evaluated)) == len(list(evaluated)) == 3
        next(stream)
        assert len(set(multiprocessing.active_children()) - before) == 2
        del training, stream, evaluated
        assert set(multiprocessing.active_children()) == before, "nothing waits for the garbage collection"
    finally:
        gc.enable()


@with_dali
@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_random_numbers_are_left_alone(tmp_path, dali, workers):
    write_shard(tmp_path, photos(8))
    before = torch.get_rng_state()
    take(dali(tmp_path, train=True, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


# Arguments


@with_dali
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64, expected one of torch.float32"),
        ({"device": "meta"}, "device is meta, expected cpu or cuda"),
        ({"threads": 0}, "threads is 0"),
        ({"max_decoded_pixels": 0}, "max_decoded_pixels is 0"),
        ({"decode_memory": 100}, "decode_memory is 100, expected at least 3 bytes a pixel"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"crop": "random"}, "crop is 'random' with train=False"),
    ],
)
def test_bad_arguments_are_refused(scene_set, dali, changes, message):
    with pytest.raises(InputError, match=message):
        dali(scene_set / "val", **changes)


def test_without_dali_it_is_refused(scene_set, dali, monkeypatch):
    monkeypatch.setattr(extras, "probe", lambda name: None)
    with pytest.raises(InputError, match="create_dali_loader needs dali, which cannot be imported here: pip install"):
        dali(scene_set / "val")


@with_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(scene_set, dali):
    with pytest.raises(InputError, match="device is cuda, but no GPU"):
        dali(scene_set / "val", device="cuda")


# On a GPU


@with_dali
@pytest.mark.gpu
@pytest.mark.parametrize("crop", CROPS)
def test_the_gpu_decodes_within_the_same_bounds(tmp_path, dali, loader, crop):
    write_shard(tmp_path, photos(12) + [("png", encoded(photo(64, 64), "PNG"), record(64, 64))] + [BROKEN[5][:3]])
    settings = LEVELS | {"crop": crop, "train": True, "flip": 0.5, "batch_size": 6, "max_broken": 1.0}
    made, plain = dali(tmp_path, device="cuda", workers=2, **settings), loader(tmp_path, **settings)
    for batch, other in zip(take(made, 6), take(plain, 6), strict=True):
        assert {getattr(batch, name).device.type for name in ("images", *TEXTS)} == {"cuda"}
        assert_same([replace(batch.to("cpu"), images=other.images)], [other])
        check_close((batch.images.cpu() - other.images).abs().reshape(6, -1).numpy())
    assert made.counts == plain.counts
    assert Counter(made.skipped) == Counter(plain.skipped)
