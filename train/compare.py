"""Set runs of the trainer beside each other: several seeds of each, mean and spread of every metric, as Markdown.

    python train/compare.py --seeds 0 1 2 --out docs/results/scenes_cpu.md \\
        --run all= --run clip="--losses clip --region roi_align"

Options after `--` go to every run. Runs that have their results.json are not repeated; a killed one is gone on with.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from cllip_fast.errors import InputError
from cllip_fast.evaluate.table import COUNTS, label
from cllip_fast.train.runs import exit_on_sigterm, results_of


def cell(values: list[float | None]) -> str:
    """Mean and, of several seeds, sample standard deviation, in percent."""
    if not values or any(value is None for value in values):
        return "–"
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}"


def hardware() -> str:
    """The GPU's name, or the processors' number and name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def environment() -> str:
    """Date, commit, hardware, threads and versions, in one line."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return (
        f"{datetime.date.today()}, commit {git.stdout.strip() or 'unknown'}, {hardware()}, "
        f"{threads} thread{'s' * (threads != '1')} a run, torch {torch.__version__}"
    )


def resolution(results: dict[str, dict[str, float | None]]) -> list[str]:
    """One line a split: how many images were asked, and how finely shares of so few can be told apart."""
    lines = []
    for split, metrics in results.items():
        images, regions = (int(metrics.get(count) or 0) for count in ("images", "regions"))
        if images:
            lines.append(
                f"* `{split}`: {images} images, {regions} regions. Chance retrieves {100 / images:.2g} % at R@1. "
                f"The choice of {images} images alone gives a share a standard error of up to {50 / images**0.5:.1f} "
                "points, which the spread over seeds does not hold."
            )
    return lines


def markdown(runs: dict[str, list[dict]], seeds: list[int], commands: dict[str, str]) -> str:
    """One table a split, one row a metric, one column a run."""
    lines = [f"Seeds {', '.join(map(str, seeds))}; mean ± sample standard deviation over seeds, percent.", ""]
    for name, records in runs.items():
        seconds = statistics.median(record["seconds"] for record in records)
        lines.append(f"* **{name}**: `{commands[name]}`, {records[0]['step']} steps, {seconds:.0f} s a run")
    results = next(iter(runs.values()))[0]["results"]
    lines += resolution(results)
    for split, metrics in results.items():
        lines += ["", f"| {split} | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
        for metric in metrics:
            if metric not in COUNTS:
                cells = [cell([record["results"][split][metric] for record in records]) for records in runs.values()]
                lines.append(f"| {label(metric)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=OPTIONS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--logs", type=Path, default=Path("runs"))
    parser.add_argument("--title", help="heads the page; default: the runs' names")
    parser.add_argument("--note", default="", help="a paragraph beneath the title")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("common", nargs="*")
    given = parser.parse_args()
    exit_on_sigterm()
    options = {name: text for name, _, text in (run.partition("=") for run in given.run)}
    runs = {name: [] for name in options}
    for seed in given.seeds:  # a seed of every run before the next seed: an early stop leaves comparable runs
        for name, text in options.items():
            arguments = [*given.common, *shlex.split(text), "--seed", str(seed)]
            print(f"{name}, seed {seed}: {given.logs / name}_seed{seed}", flush=True)
            runs[name].append(results_of(f"{name}_seed{seed}", arguments, given.logs))
    commands = {name: " ".join(["train/main.py", *given.common, text]).strip() for name, text in options.items()}
    parts = [f"# {given.title or ' and '.join(runs)}", environment(), given.note, markdown(runs, given.seeds, commands)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n\n".join(filter(None, parts)))
    print(given.out.read_text())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
