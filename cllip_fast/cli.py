"""The `cllip-fast` command. Each subcommand adds its own arguments and names the function that runs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cllip_fast import __version__
from cllip_fast.arguments import Parser
from cllip_fast.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: the command's own, or 2 after a one-line error about bad input."""
    options = create_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:  # OSError: no permission, a full disk
        print(f"cllip-fast: {error}", file=sys.stderr)
        return 2


def create_parser() -> Parser:
    parser = Parser(prog="cllip-fast", description="Tools around CLLIP-Fast: data, weights, pictures and plans.")
    parser.add_argument("--version", action="version", version=f"cllip-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_scenes, _add_convert, _add_shards, _add_export, _add_eval, _add_show, _add_report, _add_plan):
        add(commands)
    return parser


def _add_scenes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("scenes", help="make the generated data set", description=_run_scenes.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=30_000, help="training scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=500, help="held-out scenes (default %(default)s)")
    parser.add_argument("--unseen", type=int, default=500, help="scenes of unseen combinations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", choices=("normal", "hard"), default="normal")
    parser.add_argument("--processes", type=int, help="how many to draw with (default: one a CPU)")
    parser.set_defaults(run=_run_scenes)


def _run_scenes(options: argparse.Namespace) -> None:
    """Make the generated data set: scenes of coloured, textured shapes with captions and exact boxes."""
    from cllip_fast.data.scenes import make_scenes

    counts = {"train": options.train, "val": options.val, "unseen": options.unseen}
    how = {"seed": options.seed, "difficulty": options.difficulty, "processes": options.processes}
    root = make_scenes(options.out, **counts, **how)
    print(f"{root}: {', '.join(f'{count} {split}' for split, count in counts.items())} scenes")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.convert.cli import add_convert

    add_convert(commands)


def _add_shards(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.shard_tools import add_commands

    add_commands(commands)


def _add_export(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.interchange import add_commands

    add_commands(commands)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.evaluate.commands import add_commands

    add_commands(commands)


def _add_show(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.show.phrases import add_commands

    add_commands(commands)


def _add_report(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.report.commands import add_commands

    add_commands(commands)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    from cllip_fast.train.config import Config

    parser = commands.add_parser("plan", help="memory and time of a run, predicted", description=_run_plan.__doc__)
    parser.add_argument("--model", default=Config.model, help="preset (default %(default)s)")
    parser.add_argument("--device", default="h100", help="a100, h100, h200 or b200 (default %(default)s)")
    parser.add_argument("--grad-checkpointing", default="none", help="none, selective or blocks (default %(default)s)")
    parser.add_argument("--precision", default=Config.precision, help="auto (bf16), fp32, amp_bf16 or amp_fp16")
    parser.add_argument("--losses", default=Config.losses, help="as the trainer's (default %(default)s)")
    parser.add_argument("--opt", default=Config.opt, help="optimizer (default %(default)s)")
    parser.add_argument("--region", default=Config.region, help="prompter or roi_align (default %(default)s)")
    parser.add_argument("--prompter-pool", default=Config.prompter_pool, help="all or prompt; default: the preset's")
    parser.add_argument("--attention", default=Config.attention, help="back end; default: the preset's")
    numbers = {
        "--batch-size": (Config.batch_size, "images on a GPU at a time"),
        "--gpus": (1, "how many"),
        "--accum-freq": (1, "micro-batches in a step, contrasted with one another"),
        "--image-size": (Config.image_size, "pixels a side; 0: the preset's"),
        "--text-length": (Config.text_length, "tokens of a caption"),
        "--region-length": (Config.region_length, "tokens of a region text"),
        "--max-regions": (Config.max_regions, "regions of an image"),
    }
    for flag, (default, help) in numbers.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{help} (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")
    parser.set_defaults(run=_run_plan)


def _run_plan(options: argparse.Namespace) -> None:
    """Predict, by formulas alone, the peak memory of each GPU, the largest batch that fits, and a step's least time."""
    from cllip_fast import plan
    from cllip_fast.train.config import Config

    values = {name: value for name, value in vars(options).items() if name not in ("run", "json", "device")}
    values["losses"] = Config(losses=options.losses).parts
    values["precision"] = "amp_bf16" if options.precision == "auto" else options.precision
    run = plan.Settings(**values)
    device = plan.find_device(options.device)
    memory, time = plan.predict_memory(run), plan.predict_time(run, device)
    result = (run, device, memory, time, plan.largest_batch(run, device))
    print(json.dumps(plan.as_dict(*result), indent=1) if options.json else plan.as_text(*result))


if __name__ == "__main__":
    sys.exit(main())
