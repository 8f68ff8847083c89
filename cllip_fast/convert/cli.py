"""`cllip-fast convert FORMAT`: each format's module declares its own arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from cllip_fast.convert import (
    class_folders,
    coco,
    flickr30k,
    grit,
    open_images,
    refcoco,
    visual_genome,
    voc,
    yolo,
)
from cllip_fast.convert.writer import write_shards

FORMATS = {
    "coco": coco,
    "refcoco": refcoco,
    "flickr30k": flickr30k,
    "visual-genome": visual_genome,
    "grit": grit,
    "open-images": open_images,
    "voc": voc,
    "yolo": yolo,
    "class-folders": class_folders,
}


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand `convert` with a subcommand of its own for each format."""
    convert = commands.add_parser("convert", help="turn a public data set into shards")
    formats = convert.add_subparsers(title="formats", required=True, metavar="FORMAT")
    for name, module in FORMATS.items():
        summary = module.__doc__.split(":")[0]
        parser = formats.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(parser)
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
        parser.add_argument("--val-share", type=float, default=0.1, help="share for validation (default %(default)s)")
        parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default %(default)s)")
        parser.set_defaults(run=_run, read=module.read)


def _run(options: argparse.Namespace) -> None:
    own = {"run", "read", "out", "val_share", "shard_size"}
    source = options.read(**{name: value for name, value in vars(options).items() if name not in own})
    summary = write_shards(source, options.out, val_share=options.val_share, shard_size=options.shard_size)
    print(f"{options.out}: {summary}")
