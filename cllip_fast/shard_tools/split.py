"""`shards split`: the same samples in other shards, shuffled or divided into training and validation if wanted."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cllip_fast.data.decode import MAX_PIXELS
from cllip_fast.data.folders import completed, locked
from cllip_fast.data.samples import Sample
from cllip_fast.data.shards import ShardError, ShardReader
from cllip_fast.errors import InputError
from cllip_fast.shard_tools.check import Report, examine_shards


@dataclass(frozen=True)
class SplitSummary:
    """What was written and left out.

    Attributes:
        written: folder -> (samples, shards); the name is "" where nothing was divided.
        repeated: usable samples left out because an earlier one has the same key.
        report: what is wrong with the shards; samples that are not usable were left out.
    """

    written: dict[str, tuple[int, int]]
    repeated: int
    report: Report


def split_shards(
    paths: list[Path],
    out: Path,
    *,
    samples_per_shard: int | None = None,
    shards: int | None = None,
    shuffle: int | None = None,
    val_share: float = 0.0,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> SplitSummary:
    """Copy every usable sample of `paths`, all files of its key with the same names and bytes, to shards in `out`.

    Samples are examined first, as by `check_shards`. `out` appears when it is complete; nothing is ever overwritten.
    All samples' places are held in memory, as in training.

    Args:
        out: folder to make; must not exist or be empty.
        samples_per_shard: the last shard of a folder may hold fewer.
        shards: instead: into how many, of sizes that differ by one at most. With `val_share` these are the training
            shards, and those for validation get about the same size.
        shuffle: seed of a shuffle over all shards; None keeps the order.
        val_share: above 0, `out/train` and `out/val`: what is for validation depends on a hash of each key alone, so
            a sample stays where it is when others come or go. The share is met on average.
        workers, max_pixels: as for `examine_shards`.

    Raises:
        InputError: an argument is out of range, `out` is not empty, a folder would get no sample or fewer than it has
            shards, there is no room, or the shards change meanwhile.
    """
    if (samples_per_shard is None) == (shards is None):
        raise InputError(f"samples_per_shard is {samples_per_shard} and shards is {shards}, expected one of them")
    for name, value in (("samples_per_shard", samples_per_shard), ("shards", shards)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    if not 0 <= val_share < 1:
        raise InputError(f"val_share is {val_share}, expected from 0 to below 1")
    report = Report()
    try:
        with locked(out), completed(out) as partial:
            usable = list(examine_shards(paths, report, workers=workers, max_pixels=max_pixels))
            unique = {sample.key: sample for sample in reversed(usable)}  # of several, the first stays
            chosen = [sample for sample in usable if unique[sample.key] is sample]
            if shuffle is not None:
                random.Random(shuffle).shuffle(chosen)
            folders = {"": chosen}
            if val_share > 0:
                folders = {
                    name: [s for s in chosen if _is_val(s.key, val_share) == (name == "val")]
                    for name in ("train", "val")
                }
            parts = _divide(folders, samples_per_shard, shards)
            _check_room(out, partial, chosen)
            _write(partial, parts, paths, len(chosen))
    except ShardError as error:
        raise InputError(f"the shards changed while they were copied: {error}; {out} was not made") from error
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; it was not made") from error
    written = {name: (len(folders[name]), len(shard_list)) for name, shard_list in parts.items()}
    return SplitSummary(written, len(usable) - len(chosen), report)


def _is_val(key: str, share: float) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _divide(
    folders: dict[str, list[Sample]], samples_per_shard: int | None, shards: int | None
) -> dict[str, list[list[Sample]]]:
    """The samples of each shard of each folder."""
    parts = {}
    training = len(next(iter(folders.values())))
    for name, samples in folders.items():
        if not samples:
            raise InputError(f"no sample for {name or 'any shard'}: nothing to write")
        if samples_per_shard is not None:
            parts[name] = [samples[i : i + samples_per_shard] for i in range(0, len(samples), samples_per_shard)]
            continue
        count = -(-len(samples) * shards // training)
        if count > len(samples):
            raise InputError(f"shards is {shards}, expected at most one a sample, {len(samples)} here")
        cuts = [i * len(samples) // count for i in range(count + 1)]
        parts[name] = [samples[low:high] for low, high in itertools.pairwise(cuts)]
    return parts


def _check_room(out: Path, partial: Path, samples: list[Sample]) -> None:
    needed, free = sum(sample.tar_bytes for sample in samples), shutil.disk_usage(partial).free
    if needed > free:
        raise InputError(f"{out} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there")


def _write(partial: Path, parts: dict[str, list[list[Sample]]], paths: list[Path], total: int) -> None:
    reader, numbers = ShardReader(paths), {path: number for number, path in enumerate(paths)}
    with tqdm(total=total, desc="writing shards", unit=" samples", delay=2, leave=False) as bar:
        for name, shards in parts.items():
            (partial / name).mkdir(exist_ok=True)
            for i, samples in enumerate(shards):
                with tarfile.open(partial / name / f"{i:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                    for info, data in _files(samples, reader, numbers):
                        tar.addfile(info, io.BytesIO(data))
                        tar.members.clear()  # tarfile would keep every header
                bar.update(len(samples))


def _files(
    samples: list[Sample], reader: ShardReader, numbers: dict[Path, int]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Headers without time and owner, so that the same samples give the same bytes, and contents."""
    for sample in samples:
        for member in sample.members:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            yield info, reader.read(numbers[sample.path], member.offset, member.size)
