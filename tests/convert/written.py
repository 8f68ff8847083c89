"""Shards read back as they lie on disk, each record also checked as the loader checks it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllip_fast.convert import ConvertSummary, Source, write_shards
from cllip_fast.data.record import parse_record
from tests.data.painted import jpeg


def convert(source: Source, out: Path, **options: Any) -> tuple[ConvertSummary, dict[str, dict[str, Any]]]:
    """Write everything to train; the summary and the records by key."""
    summary = write_shards(source, out, **{"val_share": 0.0} | options)
    return summary, read_records(out)


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    members = {name: data for path in sorted(out.glob("*/*.tar")) for name, data in read_members(path).items()}
    records = {name.removesuffix(".json"): data for name, data in members.items() if name.endswith(".json")}
    assert len(members) == 2 * len(records)
    assert all(parse_record(data).problems == [] for data in records.values())
    return {key: json.loads(data) for key, data in records.items()}


def read_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def regions(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(text, *box) and the score where there is one."""
    return [(r["text"], *r["box"], *([r["score"]] if "score" in r else [])) for r in record["regions"]]


def paint(folder: Path, *names: str, width: int = 100, height: int = 50) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(width, height))
    return folder


def put(path: Path, content: object) -> Path:
    """Write a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def drain(read: Callable[..., Source], *arguments: Any, **options: Any) -> list[Any]:
    """Read a whole data set without writing it."""
    return list(read(*arguments, **options).samples)
