"""The subcommands of `cllip-fast shards`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from cllip_fast.data.decode import MAX_PIXELS
from cllip_fast.data.index import expand_shards
from cllip_fast.errors import InputError
from cllip_fast.shard_tools.check import check_shards, place_of
from cllip_fast.shard_tools.dali_index import write_indices
from cllip_fast.shard_tools.files import written_whole
from cllip_fast.shard_tools.split import split_shards
from cllip_fast.shard_tools.stat import gather_statistics


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `shards` and its subcommands; each sets `run`, which takes the options and returns the exit code."""
    shards = commands.add_parser("shards", help="check, describe, index and divide shards")
    tools = shards.add_subparsers(title="tools", required=True, metavar="TOOL")
    for name, run, help in (
        ("check", _run_check, "find what training would skip"),
        ("stat", _run_stat, "counts, lengths, sizes, frequent texts"),
        ("index", _run_index, "write DALI's index files"),
        ("split", _run_split, "the same samples in other shards"),
    ):
        parser = tools.add_parser(name, help=help, description=run.__doc__)
        parser.add_argument(
            "shards", nargs="+", metavar="SHARDS", help="folders, tar files or patterns such as {0000..0012}.tar"
        )
        parser.set_defaults(run=run)
        _ARGUMENTS[name](parser)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _examining_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding there")


def _stat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="NAME", help="count tokens too: 'clip' or a file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: beside each tar)")


def _split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--samples-per-shard", type=int, metavar="N")
    size.add_argument("--shards", dest="shard_count", type=int, metavar="N", help="how many (training) shards")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle over all shards (default: keep the order)")
    parser.add_argument(
        "--val-share", type=float, default=0.0, metavar="S", help="make train/ and val/; a hash of the key decides"
    )
    _examining_arguments(parser)


_ARGUMENTS = {"check": _check_arguments, "stat": _stat_arguments, "index": _index_arguments, "split": _split_arguments}


def _examining_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a CPU; 0: none)"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="larger images are not decoded but reported (default, also of training: %(default)s)",
    )


def _run_check(options: argparse.Namespace) -> int:
    """Examine every sample, decode every image, report what training would skip; exit code 1 if there is anything."""
    paths = _expand(options)
    report = check_shards(
        paths, workers=options.workers, max_pixels=options.max_pixels, keep_all=options.json is not None
    )
    _write_json(options.json, report.as_dict())
    _print(report.as_text())
    return 1 if report.skipped else 0


def _run_stat(options: argparse.Namespace) -> int:
    """Describe shards by their records; no image is opened."""
    statistics = gather_statistics(_expand(options), options.tokenizer)
    _write_json(options.json, statistics.as_dict())
    _print(statistics.as_text())
    return 0


def _run_index(options: argparse.Namespace) -> int:
    """Write the index files of DALI's WebDataset reader; exit code 1 if a shard has no sample to list."""
    summary = write_indices(_expand(options), options.out)
    _print(f"{len(summary.written)} index files, {summary.samples} samples")
    for kind, count in summary.left_out.most_common():
        first = next(fault for fault in summary.faults if fault.kind == kind)
        _print(f"not listed: {count} × {kind}, first {place_of(first)}")
    for path in summary.missing:
        _print(f"no index for {path}")
    return 1 if summary.missing else 0


def _run_split(options: argparse.Namespace) -> int:
    """Copy all usable samples, bytes unchanged, into other shards; never overwrites, appears when complete."""
    summary = split_shards(
        _expand(options),
        options.out,
        samples_per_shard=options.samples_per_shard,
        shards=options.shard_count,
        shuffle=options.shuffle,
        val_share=options.val_share,
        workers=options.workers,
        max_pixels=options.max_pixels,
    )
    for name, (samples, shards) in summary.written.items():
        _print(f"{options.out / name}: {samples} samples in {shards} shards")
    if summary.repeated:
        _print(f"left out: {summary.repeated} samples whose key an earlier one has")
    if summary.report.counts:
        _print(f"read: {summary.report.as_text()}")
    return 0


def _expand(options: argparse.Namespace) -> list[Path]:
    folder = options.json.parent if getattr(options, "json", None) else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"--json: folder {folder} does not exist")  # better now than after hours
    return expand_shards("::".join(options.shards))


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        with written_whole(path) as file:
            json.dump(value, file, indent=1)
            file.write("\n")


def _print(text: str) -> None:
    """Print whatever the terminal can show, the rest spelled out: shards may have any name."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
