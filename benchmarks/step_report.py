"""The training step's table, from a run of `test_train_step.py`, as Markdown and JSON.

python -m benchmarks.step_report .benchmarks/train_step.json    # -> benchmarks/results/train_step_cpu_<date>.md
"""

from __future__ import annotations

from typing import Any

from benchmarks.report import cell, reached, table
from benchmarks.report_file import main, origin

# (model, losses) -> bounds on columns of a row; OpenCLIP's step / ours.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("ViT-Ti-16", "clip"): {"time_ratio": 1.0},
    ("ViT-B-32", "clip"): {"time_ratio": 1.0},
}
PARTS = ("data", "vision tower", "text tower", "prompter, heads", "losses", "backward", "optimizer")


def build(raw: dict[str, Any]) -> dict[str, Any]:
    """The report, from what pytest-benchmark wrote; rows of other benchmarks are left out."""
    rows = []
    for benchmark in raw["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        if "train_step" not in info:
            continue
        step, peer = info["train_step"], info["peer"]
        row = {
            **step,
            "losses": "clip" if step["losses"] == ["clip"] else "all",
            "rounds": stats["rounds"],
            "ms": 1e3 * stats["median"],
            "min_ms": 1e3 * stats["min"],
            "peer_ms": 1e3 * peer["median"],
            "peer_min_ms": 1e3 * peer["min"],
            "time_ratio": peer["median"] / stats["median"],
            "parts_ms": info["parts"],
            "peer_parts_ms": peer["parts"],
        }
        row["goal"] = GOALS.get((row["model"], row["losses"]), {})
        row["met"] = (
            all(reached(row[name], name, bound) for name, bound in row["goal"].items()) if row["goal"] else None
        )
        rows.append(row)
    return {
        **origin(raw),
        "steps": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    header = ("model", "losses", "batch", "ours, ms", "OpenCLIP, CLIP loss, ms", "ratio", "goal")
    steps = [
        [
            *(row["model"], row["losses"], f"{row['batch']} × {row['image_size']} px, {row['text']} tokens"),
            f"{cell(row['ms'])} ({cell(row['min_ms'])})",
            f"{cell(row['peer_ms'])} ({cell(row['peer_min_ms'])})",
            cell(row["time_ratio"], 2),
            ", ".join(f"{name} ≥ {bound:g}" for name, bound in row["goal"].items())
            + {None: "", True: ": met", False: ": **not met**"}[row["met"]],
        ]
        for row in report["steps"]
    ]
    shares = [
        [row["model"], name, *shares_of(parts)]
        for row in report["steps"]
        for name, parts in ((row["losses"], row["parts_ms"]), ("OpenCLIP", row["peer_parts_ms"]))
        if name != "OpenCLIP" or row["losses"] == "clip"
    ]
    return f"""# A training step on a CPU, {report["date"]}

`{report["command"]}`, commit {report["commit"]}
({report["cpu"]}, {report["cores"]} cores, {report["threads"]} threads, torch {report["torch"]}, load average at start
{report["load"]:.2f})

fp32, one process. The same weights, images and texts, none padded; parameters, operations and the first loss are
compared first. Every round runs ours and OpenCLIP's once, the order reversed from round to round; times are medians
(fastest in brackets), ratios OpenCLIP / ours. `all` does more than its peer: the ratio is what regions cost.

{table(header, steps)}

## Parts, mean milliseconds (share of the step)

`data` is the plain loader's batch of 500 × 375 photographs in this process, beside the step: loader workers hide it.
OpenCLIP's text embedding and projection count as heads.

{table(("model", "losses", *PARTS), shares)}
"""


def shares_of(parts: dict[str, float]) -> list[str]:
    """A cell for each of `PARTS`; shares are of the step without its data."""
    step = sum(each for name, each in parts.items() if name != "data")
    return [f"{cell(parts[name])} ({parts[name] / step:.0%})" if name in parts else "–" for name in PARTS]


if __name__ == "__main__":
    main("Tables of the training step's benchmark.", "train_step", build, markdown)
