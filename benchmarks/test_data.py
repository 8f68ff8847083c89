"""The plain loader against OpenCLIP's WebDataset pipeline (`openclip_data.py`): images/s, stages, distance in pixels.

    pytest benchmarks/test_data.py --benchmark-only --benchmark-json .benchmarks/data.json
    CLLIP_BENCH_SHRINK=32 pytest benchmarks/test_data.py --benchmark-only      # a trial on a few images

Images are photographs (../shared/data/coco where it is there, else noise with their spectrum) brought to one size,
JPEG quality 90. Each round every pipeline hands over all images once, from the page cache, with workers that already
run. Ours also reads and maps four regions an image, which the peer does not.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from benchmarks.conftest import Peers
from benchmarks.openclip_data import WebDatasetPipeline, cropped, full_pillow
from benchmarks.peers import shrunk
from cllip_fast.data import Loader, create_loader, decode, train_bpe
from cllip_fast.data.assemble import Assembler
from cllip_fast.data.crop import choose_window
from cllip_fast.data.shards import ShardReader, ShardWriter, list_members
from tests.data.photos import encoded, photo

SIDE, LENGTH, BATCH = 224, 32, 16
SIZES = {(500, 375): 512, (1600, 1200): 128}  # images of each
DECODERS = ("pillow", "simplejpeg") if decode.simplejpeg else ("pillow",)
WORDS = ("dog", "cat", "red car", "tall tree", "bicycle", "street lamp", "child", "boat")


def pictures(size: tuple[int, int], count: int) -> Iterator[bytes]:
    folder = Path(__file__).parents[2] / "shared" / "data" / "coco" / "images"
    files = sorted(folder.glob("*.jpg"))
    for number in range(count):
        if files:
            image = Image.open(files[number % len(files)]).convert("RGB")
            yield encoded(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
        else:
            yield encoded(photo(*size, seed=number))


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "{}x{}".format(*size))
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, int]]:
    """Four shards of images of one size, each with its own caption and four regions."""
    size = request.param
    folder, count = tmp_path_factory.mktemp("shards"), max(2 * 2 * BATCH, shrunk(SIZES[size]))
    rng = np.random.default_rng(0)
    with ShardWriter(folder, count // 4) as writer:
        for number, data in enumerate(pictures(size, count)):
            corners = rng.random((4, 2)) * (size[0] / 2, size[1] / 2)
            boxes = np.concatenate([corners, corners + (size[0] / 4, size[1] / 4)], axis=1).tolist()
            regions = [{"box": box, "text": str(text)} for box, text in zip(boxes, rng.choice(WORDS, 4), strict=True)]
            captions = [f"photograph {number} of a {' and a '.join(rng.choice(WORDS, 3))}"]
            record = {"captions": captions, "regions": regions, "width": size[0], "height": size[1]}
            writer.write(f"k{number:06d}", data, record)
    return folder, size


def our_loader(folder: Path, decoder: str, workers: int) -> Loader:
    return create_loader(
        folder, tokenizer=train_bpe(WORDS, 512), batch_size=BATCH, image_size=SIDE, text_length=LENGTH,
        region_length=8, max_regions=4, train=True, crop="random", workers=workers, decoder=decoder,
    )  # fmt: skip


def one_pass(made: Loader, workers: int) -> DataLoader:
    """An epoch of the loader's own batches. `forever` would prepare the next ones while it is the peer's turn."""
    plans = list(itertools.islice(iter(made.parts.order), len(made)))
    return DataLoader(
        made.parts.assembler, sampler=plans, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )


def their_pass(folder: Path, workers: int) -> DataLoader:
    pipeline = WebDatasetPipeline(sorted(folder.glob("*.tar")), train_bpe(WORDS, 512), BATCH, SIDE, LENGTH)
    return DataLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def consume(batches: DataLoader) -> int:
    return sum(1 for _ in batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_throughput(benchmark: Callable, shards: tuple[Path, tuple[int, int]], workers: int) -> None:
    folder, size = shards
    made = {name: our_loader(folder, name, workers) for name in DECODERS}
    passes = {f"ours, {name}": one_pass(each, workers) for name, each in made.items()}
    passes["OpenCLIP's pipeline"] = their_pass(folder, workers)
    batches = {consume(each) for each in passes.values()}  # starts the workers, fills the page cache
    assert len(batches) == 1, "everybody hands over the same number of images"
    images = BATCH * batches.pop()
    ours, *others = passes
    turns = Peers({name: partial(consume, passes[name]) for name in others})
    benchmark.pedantic(partial(consume, passes[ours]), setup=turns.before, teardown=turns.after, rounds=5)
    seconds = {ours: benchmark.stats.stats.median} | {n: statistics.median(s) for n, s in turns.seconds.items()}
    benchmark.extra_info.update(
        suite="data", size=size, workers=workers, images=images, threads=torch.get_num_threads(),
        images_per_s={name: images / each for name, each in seconds.items()},
        ratio_to_openclip={name: seconds["OpenCLIP's pipeline"] / each for name, each in seconds.items()},
    )  # fmt: skip


class Timed:
    """Seconds spent in methods and functions while they are wrapped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: Counter[str] = Counter()
        self._patch = monkeypatch

    def wrap(self, owner: object, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        self._patch.setattr(owner, name, timed)


def our_stages(folder: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds an image, in this process and one thread."""
    batches = one_pass(our_loader(folder, decoder, 0), 0)
    images = BATCH * consume(batches)
    with monkeypatch.context() as patch:
        timed = Timed(patch)
        timed.wrap(ShardReader, "read")
        timed.wrap(decode, "_by_pillow")
        timed.wrap(decode, "_by_simplejpeg")
        timed.wrap(decode.Decoder, "fill")
        timed.wrap(Assembler, "_rows")
        timed.wrap(Assembler, "_collate")
        timed.wrap(Assembler, "__getitem__")
        consume(one_pass(our_loader(folder, decoder, 0), 0))  # a new tokenizer: no text seen before
        seconds = timed.seconds
    decoded = seconds["_by_pillow"] + seconds["_by_simplejpeg"]
    stages = {
        "read": seconds["read"],
        "decode": decoded,
        "crop and resize": seconds["fill"] - decoded,
        "normalise": seconds["_collate"] - seconds["_rows"],
        "tokenise": seconds["_rows"],
    }
    stages["other"] = seconds["__getitem__"] - sum(stages.values())
    return {stage: 1e3 * value / images for stage, value in stages.items()}


def their_stages(folder: Path) -> dict[str, float]:
    consume(their_pass(folder, 0))
    batches = their_pass(folder, 0)
    seconds: Counter[str] = Counter()
    last = time.perf_counter()

    def clock(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] += now - last
        last = now

    batches.dataset.clock = clock
    images = BATCH * consume(batches)
    return {stage: 1e3 * value / images for stage, value in seconds.items()}


def psnr(folder: Path, decoder: str, size: tuple[int, int]) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of our pixels against full Pillow's for the same windows, over all images."""
    library, errors = decode.Decoder("auto"), []
    library.name = decoder
    square = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    for shard in sorted(folder.glob("*.tar")):
        content = shard.read_bytes()
        for member in list_members(shard):
            if member.name.endswith(".jpg"):
                data = content[member.offset : member.offset + member.size]
                window = choose_window("random", *size, SIDE, seed=0, epoch=0, key=member.name)
                library.fill(data, size, window, np.zeros(3, np.uint8), square)
                full = np.asarray(cropped(full_pillow(data), window, SIDE), dtype=np.float64)
                errors.append(((square - full) ** 2).mean())
    decibels = [10 * np.log10(255**2 / max(error, 1e-12)) for error in errors]
    return {"all": 10 * float(np.log10(255**2 / np.mean(errors))), "worst": float(min(decibels))}


@pytest.mark.parametrize("decoder", DECODERS)
def test_stages(
    benchmark: Callable, shards: tuple[Path, tuple[int, int]], decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, size = shards
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        ours = benchmark.pedantic(our_stages, args=(folder, decoder, monkeypatch), rounds=1)
        benchmark.extra_info.update(
            suite="data", size=size, decoder=decoder, stages_ms={"ours": ours, "openclip": their_stages(folder)},
            psnr_db=psnr(folder, decoder, size),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
