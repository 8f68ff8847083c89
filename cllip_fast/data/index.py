"""Finding the samples: shard names expanded, and the place of every image and record in them noted before the start."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from cllip_fast.data.faults import Fault, FaultCounter
from cllip_fast.data.samples import Sample, list_samples
from cllip_fast.data.shards import ShardError
from cllip_fast.errors import InputError

_MAX_BRACES = 1_000_000


@dataclass(frozen=True)
class SampleIndex:
    """Every sample of one or several data sets, in their shards' order.

    Attributes:
        shards: the readable tar files.
        keys: the samples' keys, n of them.
        places: int64 [n, 5]: shard number, offset and size of the image, offset and size of the record, in bytes.
        sizes: samples in each data set.
    """

    shards: list[Path]
    keys: list[str]
    places: np.ndarray
    sizes: list[int]

    def digest(self) -> str:
        """The same for the same samples in the same order, wherever the shards lie."""
        digest = hashlib.blake2b(np.array(self.sizes).tobytes(), digest_size=8)
        digest.update(self.places.tobytes())
        for key in self.keys:
            digest.update(key.encode(errors="surrogatepass") + b"\n")
        return digest.hexdigest()


def expand_shards(spec: str | Path) -> list[Path]:
    """The tar files that `spec` names, in order.

    `spec` is a folder (its `*.tar`), a file, a pattern with `{0000..0012}`, `{a,b}` or `*`, or several of these joined
    by `::`.

    Raises:
        InputError: a part names nothing, or a file that it names does not exist.
    """
    paths: list[Path] = []
    for part in str(spec).split("::"):
        if not part.strip():
            raise InputError(f"shards {str(spec)!r} have an empty part, expected folders or tar files joined by '::'")
        for name in _expand_braces(part):
            paths.extend(_expand_one(name))
    return paths


def _expand_one(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            inside = sorted(folder.name for folder in path.iterdir() if any(folder.glob("*.tar")))
            hint = f"; its folders {', '.join(inside)} do" if inside else ""
            raise InputError(f"shards: folder {path} holds no *.tar file{hint}")
        return found
    if path.exists():
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path)))
    if not found:
        raise InputError(f"shards: {path} does not exist")
    return found


def _expand_braces(pattern: str) -> list[str]:
    """Expand the first `{..}` or `{,}` and go on with the rest; `{00..12}` keeps its leading zeros."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        values = match[3].split(",")
    else:
        low, high = int(match[1]), int(match[2])
        if not low <= high < low + _MAX_BRACES:
            raise InputError(f"shards: range {match[0]} in {pattern!r} is empty or too long, expected low..high")
        values = [f"{number:0{len(match[1])}d}" for number in range(low, high + 1)]
    tails = _expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + value + tail for value in values for tail in tails]


def index_shards(data_sets: Sequence[Sequence[Path]], faults: FaultCounter) -> SampleIndex:
    """Note where every sample of the data sets lies; nothing is decoded. It shows progress after two seconds.

    Raises:
        InputError: no shard of a data set can be read, or none holds a sample.
    """
    index = SampleIndex([], [], np.empty((0, 5), dtype=np.int64), [])
    places = [index.places]
    with tqdm(total=sum(map(len, data_sets)), desc="indexing", unit=" shards", delay=2, leave=False) as bar:
        for paths in data_sets:
            before, unreadable = len(index.keys), []
            for path in paths:
                try:
                    found, problems = list_samples(path)
                except ShardError as error:
                    unreadable.append(f"{path}: {error}")
                    found, problems = [], [Fault("unreadable shard", str(path), "", str(error))]
                faults.add(problems)
                if found:
                    places.append(np.array([(len(index.shards), *_place(s)) for s in found], dtype=np.int64))
                    index.shards.append(path)
                    index.keys.extend(sample.key for sample in found)
                bar.update()
            index.sizes.append(len(index.keys) - before)
            if not index.sizes[-1]:
                _refuse(paths, unreadable, faults)
    return replace(index, places=np.concatenate(places))


def _refuse(paths: Sequence[Path], unreadable: list[str], faults: FaultCounter) -> NoReturn:
    """Say why a data set has no sample."""
    if unreadable:
        raise InputError(f"no shard can be read ({len(unreadable)} of {len(paths)}); first: {unreadable[0]}")
    counts = ", ".join(f"{kind} {count}" for kind, count in faults.counts.items())
    raise InputError(f"no sample in {len(paths)} shards, first {paths[0]}; left out: {counts}")


def _place(sample: Sample) -> tuple[int, int, int, int]:
    return sample.image.offset, sample.image.size, sample.record.offset, sample.record.size
