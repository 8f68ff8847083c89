"""What shards list before an evaluation reads them: how many regions there are, and how many the fullest image has."""

from __future__ import annotations

from typing import NamedTuple

from tqdm import tqdm

from cllip_fast.data import expand_shards
from cllip_fast.data.record import RecordError
from cllip_fast.data.shards import ShardReader
from cllip_fast.shard_tools.samples import find_samples, read_record


class Listed(NamedTuple):
    """What shards list: the most regions of an image, those of all, broken ones included, and shards without a list."""

    most: int
    regions: int
    unreadable: int


def look_through(spec: str, *, progress: bool = True) -> Listed:
    """Read the records of the shards: evaluation leaves no region out, and says how many it had to."""
    most = regions = unreadable = 0
    shards = expand_shards(spec)
    for path in tqdm(shards, desc="look through", unit="shard", leave=False, disable=None if progress else True):
        samples, faults = find_samples(path)
        unreadable += not samples and len(faults) > 0
        reader = ShardReader([path])
        for sample in samples:
            try:
                record = read_record(reader, sample)[0]
            except RecordError:  # the loader counts it
                continue
            most = max(most, len(record.boxes))
            regions += len(record.boxes) + len(record.problems)
    return Listed(most, regions, unreadable)
