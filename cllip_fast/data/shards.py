"""WebDataset tar shards: `key.jpg` and `key.json` side by side. Reading never extracts anything to disk."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
RECORD_SUFFIX = "json"
_BLOCK = 512
_OCTAL = re.compile(rb"[0-7]+")


class ShardError(Exception):
    """A shard that cannot be read: not a tar file, cut short, or gone."""


class Member(NamedTuple):
    """Where one file of a shard lies: `data[offset : offset + size]` of the tar."""

    name: str
    offset: int
    size: int
    problem: str | None  # why it must not be used, None if it may


class ShardWriter:
    """Writes samples to `folder/000000.tar`, `000001.tar`, ... with `shard_size` samples each.

    The same samples give the same bytes: members carry no time and no owner. Use as a context manager.
    """

    def __init__(self, folder: Path, shard_size: int, first: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shard_size, self._next = folder, shard_size, first
        self._tar: tarfile.TarFile | None = None
        self._held = 0
        self.samples = 0

    def write(self, key: str, jpeg: bytes, record: dict[str, Any]) -> None:
        """Add one sample: the image's bytes as they are, and its record as JSON."""
        if self._tar is None or self._held == self._shard_size:
            self.close()
            path = self._folder / f"{self._next:06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed in close)
            self._next, self._held = self._next + 1, 0
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        for suffix, data in (("jpg", jpeg), ("json", text)):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # tarfile keeps every header for reading back, which nobody does here
        self._held += 1
        self.samples += 1

    def close(self) -> None:
        """Finish the shard that is being written."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file's own name, the rest is the suffix."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def list_members(path: Path) -> list[Member]:
    """The files in a shard, without reading their contents; folders are left out.

    Raises:
        ShardError: the file is missing, empty, damaged, not an uncompressed tar, or its end mark is missing.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ShardError("not a regular file")  # opening a pipe would wait for ever
        if status.st_size == 0:
            raise ShardError("empty file")
        with open(path, "rb") as file:
            members = _list_plain(file)
        return _list_any(path) if members is None else members
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(error.strerror or str(error)) from error
    except Exception as error:  # a damaged tar makes tarfile fail in many ways, out of memory and stack among them
        raise ShardError(f"not a readable tar: {str(error) or type(error).__name__}") from error


def _list_plain(file: BinaryIO) -> list[Member] | None:
    """Members of a tar that has plain headers only, about ten times as fast as `tarfile`; None for any other file."""
    members: list[Member] = []
    descriptor, length, position = file.fileno(), os.fstat(file.fileno()).st_size, 0
    while position + _BLOCK <= length:
        header = os.pread(descriptor, _BLOCK, position)
        if header == bytes(_BLOCK):
            return members or None
        checksum, size = header[148:156].strip(b"\0 "), header[124:136].strip(b"\0 ")
        plain = header[156:157] in (b"0", b"\0") and header[257:262] == b"ustar" and header[345:346] == b"\0"
        if not (plain and _OCTAL.fullmatch(checksum) and _OCTAL.fullmatch(size) and header[:100].isascii()):
            return None
        if int(checksum, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        name, offset, count = header[:100].partition(b"\0")[0].decode(), position + _BLOCK, int(size, 8)
        members.append(Member(name, offset, count, _name_problem(name)))
        position = offset + -(-count // _BLOCK) * _BLOCK
    return None


def _list_any(path: Path) -> list[Member]:
    """Members of any uncompressed tar; raises what `tarfile` raises, and `ShardError` when the end mark is missing."""
    members: list[Member] = []
    length = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            tar.members.clear()  # tarfile would keep every header
            if not info.isdir():
                plain = info.isreg() and not info.issparse()  # of a sparse file the tar holds pieces
                if plain and info.size < 0:
                    raise ShardError(f"damaged: a member of {info.size} bytes at byte {info.offset_data}")
                if plain and info.offset_data + info.size > length:
                    raise ShardError(f"cut short: it ends at byte {length}, inside a member of {info.size} bytes")
                problem = _name_problem(info.name) if plain else "not a regular file"
                members.append(Member(info.name, info.offset_data, info.size, problem))
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(_BLOCK)
        if len(end) < _BLOCK:
            raise ShardError("cut short: the end mark is missing")
        if end != bytes(_BLOCK):
            raise ShardError(f"damaged: neither a header nor the end mark at byte {tar.offset}")
    return members


def _name_problem(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.isprintable():
        return "unsafe name"
    return None


class ShardReader:
    """Reads byte ranges of many shards; keeps a bounded number of files open. Safe to copy into other processes."""

    def __init__(self, paths: list[Path], max_open: int = 64) -> None:
        self._paths, self._max_open = paths, max_open
        self._files: dict[int, int] = {}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of shard number `shard`; `ShardError` if they are no longer there."""
        try:
            data = self._read(shard, offset, size)
        except OSError as error:
            self._close(shard)  # a network file system may have dropped it: the next read opens it again
            raise ShardError(str(error)) from error
        if len(data) != size:
            raise ShardError(f"{self._paths[shard]} changed: {len(data)} of {size} bytes at {offset}")
        return data

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            while len(self._files) >= self._max_open:
                self._close(next(iter(self._files)))
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        file = self._files[shard]
        data = os.pread(file, size, offset)
        while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
            data += more  # some file systems return less than was asked for
        return data

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_max_open": self._max_open, "_files": {}}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
