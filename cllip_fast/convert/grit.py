"""GRIT: image-text pairs of the web, whose captions' noun phrases and referring expressions have boxes.

Layout (huggingface.co/datasets/zzliang/GRIT, downloaded by img2dataset as WebDataset): tars of key.jpg and key.json,
the latter with `caption`, `url`, and `noun_chunks` and `ref_exps`, lists of [start, end, x0, y0, x1, y1, score]: a span
of the caption's characters, a box in [0, 1] of width and height, and GLIP's confidence. With `--metadata parquet` all
of that is read from the parquet file beside each tar (00000.parquet, 00000.tar), where a column `key` holds the keys.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllip_fast.convert.files import check_entry, check_numbers, parse_json
from cllip_fast.convert.sample import Region, Sample, Source
from cllip_fast.data import expand_shards
from cllip_fast.data.shards import RECORD_SUFFIX, Member, ShardError, list_members, split_name
from cllip_fast.errors import InputError, check_choice

_IMAGES = ("jpg", "jpeg", "png", "webp")
_SPANS = ("noun_chunks", "ref_exps")
_METADATA = ("json", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", required=True, metavar="DIR", help="folder of the tars, or a pattern of their names"
    )
    help = "where captions and boxes are: in the tars' JSON files, or in parquet files beside them (needs pyarrow)"
    parser.add_argument("--metadata", choices=_METADATA, default="json", help=f"{help} (default %(default)s)")


def read(shards: str | Path, metadata: str = "json") -> Source:
    """Read img2dataset's output; `InputError` if a file is missing or malformed, or pyarrow is needed and absent.

    Images with neither list are skipped. Members' names are keys at most: nothing is ever extracted.
    """
    check_choice("metadata", metadata, _METADATA)
    if metadata == "parquet":
        _import_parquet()
    skipped: Counter[str] = Counter()
    return Source("grit", _samples(expand_shards(shards), metadata, skipped), skipped=skipped)


def _samples(shards: list[Path], metadata: str, skipped: Counter[str]) -> Iterator[Sample]:
    for path in shards:
        try:
            members = list_members(path)
        except ShardError as error:
            raise InputError(f"{path} is no complete tar: {error}") from error
        rows = _read_rows(path.with_suffix(".parquet")) if metadata == "parquet" else None
        with open(path, "rb") as file:
            for key, parts in _by_key(members, skipped).items():
                image = next((parts[suffix] for suffix in _IMAGES if suffix in parts), None)
                if image is None:
                    skipped["images without a file"] += 1
                    continue
                place = f"{path}: {key}"
                if rows is not None:
                    entry = rows.get(key.rpartition("/")[2])
                elif RECORD_SUFFIX in parts:
                    entry = parse_json(f"{place}.json", _read_member(file.fileno(), parts[RECORD_SUFFIX]))
                else:
                    entry = None
                if entry is None:
                    skipped["images without a record"] += 1
                    continue
                yield _sample(place, key, _read_member(file.fileno(), image), entry, skipped)


def _by_key(members: list[Member], skipped: Counter[str]) -> dict[str, dict[str, Member]]:
    """The usable members of a tar by key and suffix."""
    files: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in members:
        if member.problem is not None:
            skipped[f"archive members: {member.problem}"] += 1
            continue
        key, suffix = split_name(member.name.removeprefix("./"))
        files[key][suffix] = member
    return files


def _sample(place: str, key: str, image: bytes, entry: object, skipped: Counter[str]) -> Sample:
    """One image with the regions of both lists; an expression that only repeats its noun phrase is a region once."""
    entry = check_entry(place, entry, {})
    caption, url = entry.get("caption"), entry.get("url")
    if not isinstance(caption, str):
        return Sample(key, image, [], [])  # a web page without alt text: counted by the writer
    regions: dict[Region, None] = {}
    for name in _SPANS:
        if name not in entry:
            raise InputError(f"{place} has no {name}: let img2dataset save it, or choose the other --metadata")
        spans = entry[name] or []
        if not isinstance(spans, list):
            raise InputError(f"{place} has {name} of type {type(spans).__name__}, expected a list")
        for number, span in enumerate(spans):
            where = f"{place}.{name}[{number}]"
            start, end, *box, score = check_numbers(where, span, 7)
            if not 0 <= score <= 1:
                raise InputError(f"{where} has score {score}, expected 0 to 1")
            if not 0 <= start < end <= len(caption):
                skipped["phrases outside their caption"] += 1
                continue
            regions[Region(tuple(box), caption[int(start) : int(end)], score)] = None
    source = url if isinstance(url, str) else None
    return Sample(key, image, [caption], list(regions), relative=True, source=source)


def _read_member(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "metadata 'parquet' needs pyarrow, which cannot be imported here: pip install pyarrow"
        ) from error
    return parquet


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the parquet file beside a tar, by key."""
    try:
        rows = _import_parquet().read_table(path, columns=["key", "caption", "url", *_SPANS]).to_pylist()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError) as error:  # pyarrow's own errors are kinds of these
        raise InputError(f"{path} is no parquet file of img2dataset with {', '.join(_SPANS)}: {error}") from error
    return {row["key"]: row for row in rows}
