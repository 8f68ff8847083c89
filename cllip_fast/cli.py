"""The `cllip-fast` command. Each subcommand adds its own arguments and names the function that runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cllip_fast import __version__
from cllip_fast.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, or 2 after a one-line error about bad input."""
    parser = argparse.ArgumentParser(prog="cllip-fast", description="Tools around CLLIP-Fast's data.")
    parser.add_argument("--version", action="version", version=f"cllip-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_scenes, _add_convert):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"cllip-fast: {error}", file=sys.stderr)
        return 2
    return 0


def _add_scenes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("scenes", help="make the generated data set", description=_run_scenes.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=30_000, help="training scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=500, help="held-out scenes (default %(default)s)")
    parser.add_argument("--unseen", type=int, default=500, help="scenes of unseen combinations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="how many to draw with (default: one a CPU)")
    parser.set_defaults(run=_run_scenes)


def _run_scenes(options: argparse.Namespace) -> None:
    """Make the generated data set: scenes of coloured, textured shapes with captions and exact boxes."""
    from cllip_fast.data.scenes import make_scenes

    counts = {"train": options.train, "val": options.val, "unseen": options.unseen}
    root = make_scenes(options.out, **counts, seed=options.seed, processes=options.processes)
    print(f"{root}: {', '.join(f'{count} {split}' for split, count in counts.items())} scenes")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="turn a public data set into shards")
    formats = convert.add_subparsers(title="formats", required=True, metavar="FORMAT")
    parser = formats.add_parser("coco", help="COCO's annotation files", description=_run_convert_coco.__doc__)
    parser.add_argument("--instances", type=Path, required=True, metavar="JSON", help="instances file: boxes, classes")
    parser.add_argument("--captions", type=Path, required=True, metavar="JSON", help="captions file")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--val-share", type=float, default=0.1, help="share for validation (default %(default)s)")
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default %(default)s)")
    parser.set_defaults(run=_run_convert_coco)


def _run_convert_coco(options: argparse.Namespace) -> None:
    """Turn COCO files into shards: class names become region texts, captions become texts."""
    from cllip_fast.data.coco import convert_coco

    summary = convert_coco(
        options.instances,
        options.captions,
        options.images,
        options.out,
        val_share=options.val_share,
        shard_size=options.shard_size,
    )
    print(f"{options.out}: {summary}")


if __name__ == "__main__":
    sys.exit(main())
