"""Tools around shards: `cllip-fast shards check|stat|index|split`."""

from cllip_fast.shard_tools.check import Report, check_shards, examine_shards
from cllip_fast.shard_tools.commands import add_commands
from cllip_fast.shard_tools.dali_index import IndexSummary, write_indices
from cllip_fast.shard_tools.split import SplitSummary, split_shards
from cllip_fast.shard_tools.stat import Statistics, gather_statistics

__all__ = [
    "IndexSummary",
    "Report",
    "SplitSummary",
    "Statistics",
    "add_commands",
    "check_shards",
    "examine_shards",
    "gather_statistics",
    "split_shards",
    "write_indices",
]
