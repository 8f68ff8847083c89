"""Tars made by hand, good and bad, and the command line to try on them."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from cllip_fast.shard_tools import add_commands
from tests.data.painted import jpeg, record

REGIONS = [{"box": [2, 2, 9, 9], "text": "white square"}]


def raw_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes) with nothing checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, image: bytes | None = None, *, suffix: str = "jpg", **changes: Any) -> list[tuple[str, bytes]]:
    """The two files of a sample, good unless changed."""
    changes = {"regions": REGIONS} | changes
    text = json.dumps(record(**changes), separators=(", ", ":\n")).encode()  # not as ShardWriter would write it
    return [(f"{key}.{suffix}", jpeg(16, 16, (2, 2, 9, 9)) if image is None else image), (f"{key}.json", text)]


def good(prefix: str = "g", count: int = 6) -> list[tuple[str, bytes]]:
    return [file for i in range(count) for file in sample(f"{prefix}{i}")]


def run(*arguments: object) -> int:
    """The exit code of `cllip-fast shards ...`."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    options = parser.parse_args(["shards", *map(str, arguments)])
    return options.run(options)


def contents(path: Path) -> dict[str, bytes]:
    """What `tarfile` finds in a tar, by name."""
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}
