"""What the tools read of a shard: its samples, where an unreadable shard is one finding more, and their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllip_fast.data.faults import Fault
from cllip_fast.data.record import Record, RecordError, parse_record
from cllip_fast.data.samples import Sample, list_samples
from cllip_fast.data.shards import ShardError, ShardReader


def find_samples(path: Path) -> tuple[list[Sample], list[Fault]]:
    """`list_samples`; a shard that cannot be read has none, and says why."""
    try:
        return list_samples(path)
    except ShardError as error:
        return [], [Fault("unreadable shard", str(path), "", str(error))]


def read_record(reader: ShardReader, sample: Sample) -> tuple[Record, dict[str, Any]]:
    """The checked record of a sample and the JSON object it was made from; `reader` is of the sample's shard alone.

    Raises:
        RecordError: as `parse_record`; also when the record is no longer there.
    """
    try:
        data = reader.read(0, sample.record.offset, sample.record.size)
    except ShardError as error:
        raise RecordError("unreadable shard", str(error)) from error
    return parse_record(data), json.loads(data)
