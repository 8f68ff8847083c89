"""The study: every loss and every way to read a region beside the others, on the harder generated scenes.

    python train/study.py              # 17 variants, 3 seeds: hours on a CPU
    python train/study.py --short      # 7 variants, one seed, few steps: minutes on two cores
    python train/study.py --steps 400 --batch-size 32 --seeds 0 1 --variants clip all region

One run at a time, a seed of every variant before the next seed, the most telling variants first; what each says goes to
NAME.out beside it. Runs that have results are not repeated; a killed study goes on where it was when the same command
is given again. After each run it writes, of all runs that have ended, the page, every metric of every run as JSON
beside it, and two pictures.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError, check_choice
from cllip_fast.evaluate.table import label
from cllip_fast.train.compare import cell
from cllip_fast.train.runs import exit_on_sigterm, results_of
from cllip_fast.train.study_report import Study
from cllip_fast.train.variants import SHORT, VARIANTS

SHOWN = ("i2t_r1", "recognition_top1", "t2r_r10", "pointing")  # of a run that has ended, on the terminal


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="seven variants, one seed, 200 steps of 32")
    parser.add_argument("--steps", type=int, help="steps of a run (default: 1200)")
    parser.add_argument("--batch-size", type=int, help="images of a step (default: 64)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"some of {' '.join(VARIANTS)}")
    parser.add_argument("--evaluations", type=int, default=4, help="times that a run is evaluated (default: 4)")
    parser.add_argument("--scenes", type=int, default=30_000, help="training scenes (default: 30000)")
    parser.add_argument("--scenes-dir", type=Path, default=Path("data/scenes-hard"), help="where the scenes are kept")
    parser.add_argument("--logs-dir", type=Path, help="folder of the runs (default: runs/study_<steps>x<batch size>)")
    parser.add_argument("--out", type=Path, help="page to write (default: docs/results/study_<hardware>_<date>.md)")
    parser.add_argument("common", nargs="*", help="after --: options of the trainer for every run")
    given = parser.parse_args()
    given.steps = given.steps or (200 if given.short else 1200)
    given.batch_size = given.batch_size or (32 if given.short else 64)
    given.seeds = given.seeds or ([0] if given.short else [0, 1, 2])
    given.variants = given.variants or list(SHORT if given.short else VARIANTS)
    for name in given.variants:
        check_choice("--variants", name, tuple(VARIANTS))
    given.logs_dir = given.logs_dir or Path(f"runs/study_{given.steps}x{given.batch_size}")
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if torch.cuda.is_available() else "cpu"
    kind = "study_short" if given.short else "study"
    given.out = given.out or Path(f"docs/results/{kind}_{device}_{datetime.date.today()}.md")
    return given


def main() -> None:
    given = parse()
    exit_on_sigterm()
    scenes = make_scenes(given.scenes_dir, train=given.scenes, unseen=250, difficulty="hard")
    every = max(1, given.steps // given.evaluations)
    options = [
        "--train-data", str(scenes / "train"), "--val-data", f"val={scenes / 'val'},unseen={scenes / 'unseen'}",
        "--steps", str(given.steps), "--batch-size", str(given.batch_size),
        "--eval-frequency", str(every), "--save-frequency", str(every), "--keep", "1", *given.common,
    ]  # fmt: skip
    command = shlex.join(["python", "train/study.py", *sys.argv[1:]])
    title = "Which losses pay, on generated scenes" + " (short form)" * given.short
    study = Study(command, options, len(given.seeds), title)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    runs = {
        given.logs_dir / f"{variant.name}_seed{seed}": (
            variant,
            [*options, *variant.flags.split(), "--seed", str(seed)],
        )
        for seed in given.seeds
        for variant in VARIANTS.values()
    }
    # What is there goes into the page even if it was not asked for now.
    there = [folder for folder in runs if (folder / "results.json").exists()]
    for folder in there:
        variant, arguments = runs[folder]
        study.add(variant.name, results_of(folder.name, arguments, given.logs_dir), folder)
    missing = [folder for folder in runs if folder not in there and runs[folder][0].name in given.variants]
    print(f"{len(there)} runs are there, {len(missing)} to go in {given.logs_dir}", flush=True)
    began = time.perf_counter()
    for number, folder in enumerate(missing, 1):
        variant, arguments = runs[folder]
        record = results_of(folder.name, arguments, given.logs_dir)
        study.add(variant.name, record, folder)
        study.write(given.out)
        seconds = (time.perf_counter() - began) / number * (len(missing) - number)
        end = record["results"]["val"]
        figures = ", ".join(f"{label(metric)} {cell([end[metric]])}" for metric in SHOWN)
        left = datetime.timedelta(seconds=round(seconds))
        print(f"[{number}/{len(missing)}] {folder.name}: {figures} | {left} left", flush=True)
    study.write(given.out)
    print(f"wrote {given.out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
