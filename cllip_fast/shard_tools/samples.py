"""The samples of one shard with all their files, by the rules of training's index, and their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cllip_fast.data.faults import Fault
from cllip_fast.data.record import Record, RecordError, parse_record
from cllip_fast.data.shards import (
    IMAGE_SUFFIXES,
    RECORD_SUFFIX,
    Member,
    ShardError,
    ShardReader,
    list_members,
    split_name,
)

MAX_BYTES = 1 << 28  # of an image or record: what these tools read into memory at once
_BLOCK = 512


class Sample(NamedTuple):
    """A key that has an image and a record.

    Attributes:
        members: all files of the key in the tar's order: the image, the record, and others such as key.txt.
    """

    path: Path
    key: str
    image: Member
    record: Member
    members: list[Member]

    @property
    def tar_bytes(self) -> int:
        """What the sample takes in a tar file: a header and whole blocks for each file."""
        return sum(_BLOCK - (-member.size // _BLOCK) * _BLOCK for member in self.members)


def list_samples(path: Path) -> tuple[list[Sample], list[Fault]]:
    """The samples of one shard in training's order, and what training leaves out; nothing is decoded.

    Of several files with the same key and suffix (or several images of a key) the first counts. Files without image
    and record beside them are no sample, and no fault either.
    """
    shard = str(path)
    try:
        members = list_members(path)
    except (ShardError, RecursionError, MemoryError, OverflowError) as error:  # hostile headers reach the last three
        return [], [Fault("unreadable shard", shard, "", str(error) or type(error).__name__)]
    groups: dict[str, dict[str, Member]] = {}
    faults: list[Fault] = []
    for member in members:
        if member.problem is not None:
            faults.append(Fault(member.problem, shard, ascii(member.name), "such a member is never read"))
            continue
        key, suffix = split_name(member.name)
        group, role = groups.setdefault(key, {}), "image" if suffix in IMAGE_SUFFIXES else f".{suffix}"
        if role in group:
            faults.append(Fault("duplicate member", shard, key, f"a second {suffix} for the same key"))
        else:
            group[role] = member
    samples = []
    for key, group in groups.items():
        image, record = group.get("image"), group.get(f".{RECORD_SUFFIX}")
        if image and record:
            samples.append(Sample(path, key, image, record, list(group.values())))
        elif image:
            faults.append(Fault("missing record", shard, key, "an image without .json"))
        elif record:
            faults.append(Fault("missing image", shard, key, "a record without image"))
    if not samples:
        faults.append(Fault("empty shard", shard, "", "it holds no image with a record"))
    return sorted(samples, key=lambda sample: sample.image.offset), faults


def read_record(reader: ShardReader, sample: Sample) -> tuple[Record, dict[str, Any]]:
    """The checked record of a sample and the JSON object it was made from; `reader` is of the sample's shard alone.

    Raises:
        RecordError: as `parse_record`; also when the record is too large or no longer there.
    """
    if sample.record.size > MAX_BYTES:
        raise RecordError("over the byte limit", f"record of {sample.record.size} bytes, at most {MAX_BYTES} are read")
    try:
        data = reader.read(0, sample.record.offset, sample.record.size)
    except ShardError as error:
        raise RecordError("unreadable shard", str(error)) from error
    try:
        return parse_record(data), json.loads(data)
    except OverflowError as error:
        raise RecordError("bad record", f"a number beyond all bounds: {error}") from error
