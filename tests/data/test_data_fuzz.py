"""Shards damaged at random bytes: everything is read or counted, and every tool names the same losses as the loader."""

from __future__ import annotations

import logging
import random
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from cllip_fast.data import Loader, Tokenizer, create_loader
from cllip_fast.data.faults import FaultCounter
from cllip_fast.data.index import expand_shards, index_shards
from cllip_fast.data.shards import ShardError, list_members
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import check_shards, gather_statistics, split_shards, write_indices
from tests.data.painted import record, write_shard
from tests.data.photos import encoded, photo
from tests.ranks import on_ranks

HEADROOM = 2 << 30  # bytes of address space above what the process starts with
PER_SAMPLE = ("broken image", "size differs from record", "no caption", "bad record", "too many pixels")


class Result(NamedTuple):
    """What one damaged folder gave."""

    lost: Counter[str]
    kinds: Counter[str]
    seen: int


def photographs(folder: Path, files: list[tuple[bytes, tuple[int, int]]]) -> bytes:
    """The bytes of a shard."""
    regions = [{"box": [i, i, i + 9.5, i + 8], "text": f"thing {i}"} for i in range(4)]
    samples = [
        (f"k{i}", data, record(*size, regions=regions, captions=["a thing", "thing"]))
        for i, (data, size) in enumerate(files)
    ]
    return write_shard(folder, samples).read_bytes()


def damaged(whole: bytes, members: list[tuple[int, int]], rng: random.Random) -> bytes:
    """A few bytes changed, cut out or put in; `members` are offsets and sizes of the contents."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 2, 5])):
        offset, size = rng.choice(members)
        place = rng.choice(["header"] + ["content"] * 6 + ["start"] * 6 + ["anywhere"])
        at = {
            "header": offset - 512 + rng.randrange(512),
            "content": offset + rng.randrange(size),
            "start": offset + rng.randrange(min(size, 300)),
            "anywhere": rng.randrange(len(data)),
        }[place]
        at = min(at, len(data) - 1)
        how = rng.choice(["bit"] * 5 + ["byte"] * 5 + ["digit"] * 5 + ["many"] * 3 + ["cut", "put", "end"])
        if how == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif how == "byte":
            data[at] = rng.randrange(256)
        elif how == "digit":
            data[at] = rng.choice(b'0123456789{}[]",:e-')
        elif how == "many":
            data[at : at + 40] = rng.randbytes(len(data[at : at + 40]))
        elif how == "cut":
            del data[at : at + rng.choice([1, 512])]
        elif how == "put":
            data[at:at] = rng.choice([b"\0", bytes(512), rng.randbytes(512)])
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def limited(*task: object) -> list[Result | str]:
    """Run a function in a process of limited memory: a crash, a hang or a blow-up there fails the test."""
    return on_ranks(1, run_limited, *task, timeout=240)[0]


def run_limited(rank: int, world_size: int, function: Callable[..., list[Result | str]], *args: object) -> object:
    limit_memory()
    return function(*args)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines.append(entry.getMessage())


def read_all(folder: Path, tokenizer: Tokenizer) -> Result | str:
    """Every sample through the loader and every tool, compared; why the loader refuses the folder, if it does."""
    paths = expand_shards(folder)
    report = check_shards(paths, keep_all=True)
    assert gather_statistics(paths).images >= report.usable
    assert write_indices(paths, folder / "index").samples == report.samples
    settings = {"tokenizer": tokenizer, "batch_size": 3, "image_size": 24, "text_length": 8, "region_length": 4}
    settings |= {"max_regions": 3, "max_broken": 1.0}
    log = Lines()
    logger = logging.getLogger("cllip_fast.data")
    logger.addHandler(log)
    try:
        made = create_loader(folder, train=False, **settings)
        seen = [key for batch in made for key in batch.keys]
        check_log(made, log.lines)
    except InputError as error:
        assert report.samples == 0
        return str(error)
    finally:
        logger.removeHandler(log)
    index = index_shards([paths], FaultCounter())
    lost = Counter(index.keys) - Counter(seen)
    assert lost == Counter(fault.key for kind in PER_SAMPLE for fault in report.places.get(kind, []))
    without_captions = Counter({kind: n for kind, n in report.skipped.items() if kind != "caption without text"})
    assert made.skipped == without_captions
    assert (report.samples, report.usable) == (len(index.keys), len(seen))
    check_training(folder, settings, usable=bool(seen))
    if seen:
        summary = split_shards(paths, folder / "split", shards=1, shuffle=0)
        assert summary.written[""][0] + summary.repeated == len(seen)
        assert check_shards(expand_shards(folder / "split")).usable == summary.written[""][0]
    return Result(lost, made.skipped, len(seen))


def check_log(made: Loader, lines: list[str]) -> None:
    counts = made.counts
    assert counts["samples_seen"] + counts["samples_skipped"] == counts["samples_total"] == made.samples
    warnings = [line for line in lines if line.startswith("skipped (")]
    assert {line[len("skipped (") : line.index(")")] for line in warnings} == set(made.skipped)
    assert len(warnings) == len(made.skipped), "the first of each kind"
    for line in warnings:
        of_shard = "unreadable shard" in line or "empty shard" in line
        assert ".tar: " in line if of_shard else ".tar: k" in line or ".tar: '" in line, line
        assert " at 0x" not in line


def check_training(folder: Path, settings: dict, usable: bool) -> None:
    settings = settings | {"batch_size": 1, "crop": "random", "train": True}
    made = create_loader(folder, **settings)
    stream = made.forever()
    if not usable:
        with pytest.raises(InputError, match="in a row cannot be used"):
            next(stream)
        return
    assert all(len(next(stream)) == 1 for _ in range(len(made)))
    counts = made.counts
    assert counts["samples_seen"] + counts["samples_skipped"] == counts["samples_total"] == made.samples


def read_damaged(work: Path, whole: bytes, seeds: range, tokenizer: Tokenizer) -> list[Result | str]:
    (work / "whole.tar").write_bytes(whole)
    members = [(member.offset, member.size) for member in list_members(work / "whole.tar")]
    results = []
    for seed in seeds:
        folder = work / str(seed)
        folder.mkdir()
        for i in range(2):
            rng = random.Random(f"{seed}/{i}")
            (folder / f"{i}.tar").write_bytes(damaged(whole, members, rng))
        try:
            results.append(read_all(folder, tokenizer))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    return results


def test_damage_is_counted_alike_by_loader_and_tools(tmp_path, tokenizer):
    sizes = [(40, 30), (30, 50), (33, 33), (64, 20), (21, 60)]
    files = [(encoded(photo(*size, seed=i)), size) for i, size in enumerate(sizes)]
    files += [(encoded(photo(24, 24), "PNG"), (24, 24)), (encoded(photo(50, 40), progressive=True), (50, 40))]
    results = limited(read_damaged, tmp_path, photographs(tmp_path / "whole", files), range(60), tokenizer)
    read = [result for result in results if isinstance(result, Result)]
    kinds = sum((result.kinds for result in read), Counter())
    assert kinds.keys() >= {"broken image", "bad record", "unreadable shard"}, "the damage reaches every layer"
    assert sum(result.seen for result in read) > 2 * sum(result.lost.total() for result in read) > 0
    for refusal in (result for result in results if isinstance(result, str)):
        assert "no shard can be read (2 of 2)" in refusal


def test_damaged_photographs_are_counted_alike(tmp_path, tokenizer, coco):
    files = []
    for path in sorted((coco / "images").glob("*.jpg"))[::70]:
        with Image.open(path) as image:
            files.append((path.read_bytes(), image.size))
    results = limited(read_damaged, tmp_path, photographs(tmp_path / "whole", files), range(8), tokenizer)
    assert sum(result.seen for result in results if isinstance(result, Result)) > 0


def test_damaged_headers_only_make_a_shard_unreadable(tmp_path):
    files = [(encoded(photo(16, 16)), (16, 16))] * 2
    whole = photographs(tmp_path / "whole", files)
    headers = [member.offset - 512 for member in list_members(tmp_path / "whole" / "000000.tar")]
    rng, path = random.Random(0), tmp_path / "damaged.tar"
    read = 0
    for _ in range(300):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        at = rng.choice(headers)
        header = data[at : at + 512]
        for _ in range(rng.randrange(1, 4)):
            where = rng.choice([rng.randrange(100), 156, rng.randrange(124, 136), rng.randrange(257, 265)])
            header[where] = rng.choice([*b"0123456789 xgLKSN\0", 0x80, 0xFF, rng.randrange(256)])
        header[148:156] = list(b" " * 8)
        header[148:156] = list(b"%06o\0 " % int(header.sum(dtype=np.int64)))
        path.write_bytes(data.tobytes())
        try:
            members = list_members(path)
        except ShardError:
            continue
        read += 1
        assert all(
            member.problem or 0 <= member.offset <= member.offset + member.size <= len(whole) for member in members
        )
    assert 0 < read < 300
