"""Public data sets to shards: a reader for each format, one writer. docs/data.md shows the layouts.

    from cllip_fast.convert import coco, write_shards

    print(write_shards(coco.read(instances, captions, images), out))

A reader is a module with `add_arguments`, which declares its options for `cllip-fast convert`, and `read`, which takes
the same by keyword and returns a `Source`. `FORMATS` in `cli.py` lists them.
"""

from cllip_fast.convert.sample import Region, Sample, Source
from cllip_fast.convert.writer import ConvertSummary, write_shards

__all__ = ["ConvertSummary", "Region", "Sample", "Source", "write_shards"]
