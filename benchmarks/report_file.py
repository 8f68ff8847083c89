"""What the reports have in common: where and on what they were measured, and how they get into benchmarks/results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
Report = dict[str, Any]


def origin(raw: Report) -> Report:
    """Date, commit, command and machine, out of what `pytest --benchmark-json` wrote."""
    commit = raw["commit_info"]
    return {
        "date": raw["datetime"][:10],
        "commit": str(commit.get("id"))[:12] + (" with changes" if commit.get("dirty") else ""),
        **raw["machine_info"]["cllip_fast"],
    }


def main(description: str, name: str, build: Callable[[Report], Report], markdown: Callable[[Report], str]) -> None:
    """The command line of a report: write results/<name>_cpu_<date>.{md,json}."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("measured", type=Path, help="file that `pytest --benchmark-json` wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report")
    args = parser.parse_args()
    report = build(json.loads(args.measured.read_text()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}_cpu_{report['date']}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    print(f"wrote {path}.md and .json")
