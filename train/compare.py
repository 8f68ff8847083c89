"""Set runs of the trainer beside each other: several seeds of each, mean and spread of every metric, as Markdown.

    python train/compare.py --seeds 0 1 2 --out docs/results/scenes_cpu.md \\
        --run all= --run clip="--losses clip --region roi_align"

Options after `--` go to every run. Runs that have their results.json are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from cllip_fast.evaluate.table import label

COUNTS = ("images", "regions")
MAIN = Path(__file__).with_name("main.py")


def results_of(name: str, options: list[str], logs: Path) -> dict[str, object]:
    """Train the run `name` unless it is there already; return its results.json."""
    path = logs / name / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(MAIN), *options]
    if not path.exists():
        subprocess.run([*command, "--logs-dir", str(logs), "--name", name], check=True)
    return json.loads(path.read_text())


def cell(values: list[float | None]) -> str:
    """Mean and, of several seeds, sample standard deviation, in percent."""
    if any(value is None for value in values):
        return "–"
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}"


def environment() -> str:
    """Date, commit, hardware and versions, in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"{datetime.date.today()}, commit {commit or 'unknown'}, {device}, torch {torch.__version__}"


def markdown(runs: dict[str, list[dict]], seeds: list[int], commands: dict[str, str]) -> str:
    """One table a split, one row a metric, one column a run."""
    lines = [f"Seeds {', '.join(map(str, seeds))}; mean ± sample standard deviation over seeds, percent.", ""]
    for name, records in runs.items():
        seconds = statistics.median(record["seconds"] for record in records)
        lines.append(f"* **{name}**: `{commands[name]}`, {records[0]['step']} steps, {seconds:.0f} s a run")
    for split, metrics in next(iter(runs.values()))[0]["results"].items():
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("common", nargs="*")
    given = parser.parse_args()
    options = {name: text for name, _, text in (run.partition("=") for run in given.run)}
    runs = {name: [] for name in options}
    for seed in given.seeds:  # a seed of every run before the next seed: an early stop leaves comparable runs
        for name, text in options.items():
            arguments = [*given.common, *shlex.split(text), "--seed", str(seed)]
            runs[name].append(results_of(f"{name}_seed{seed}", arguments, given.logs))
    commands = {name: " ".join(["train/main.py", *given.common, text]).strip() for name, text in options.items()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(f"# {' and '.join(runs)}\n\n{environment()}\n\n{markdown(runs, given.seeds, commands)}")
    print(given.out.read_text())


if __name__ == "__main__":
    main()
