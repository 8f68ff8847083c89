"""Set runs of the trainer beside each other: several seeds of each, mean and spread of every metric, as Markdown.

    python train/compare.py --seeds 0 1 2 --out docs/results/scenes_cpu.md \\
        --run all= --run clip="--losses clip --region roi_align" -- --scenes 30000

Options after `--` go to every run. Runs that have their results are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

MAIN = Path(__file__).with_name("main.py")
Metrics = dict[str, float | None]


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


def markdown(runs: dict[str, list[dict]], seeds: list[int], commands: dict[str, str]) -> str:
    """One table a split, one row a metric, one column a run."""
    first = next(iter(runs.values()))[0]
    lines = [f"Seeds {', '.join(map(str, seeds))}; mean ± sample standard deviation, percent.", ""]
    for name, records in runs.items():
        seconds = statistics.median(record["seconds"] for record in records)
        lines.append(f"* `{name}`: `{commands[name]}`, {records[0]['step']} steps, {seconds:.0f} s a run")
    for split, metrics in first["results"].items():
        lines += ["", f"| {split} | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
        for metric, value in metrics.items():
            if value is None or isinstance(value, float):
                cells = [cell([record["results"][split][metric] for record in records]) for records in runs.values()]
                lines.append(f"| {metric} | " + " | ".join(cells) + " |")
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
    given.out.write_text(markdown(runs, given.seeds, commands))
    print(given.out.read_text())


if __name__ == "__main__":
    main()
