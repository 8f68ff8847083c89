"""The study's page: orderings, effects, plateaus and tables, all computed from the runs so far."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllip_fast.evaluate.table import COUNTS, label
from cllip_fast.show.curves import read_log
from cllip_fast.show.variants import Curve, variant_curves, variant_dots
from cllip_fast.train.compare import cell, environment, resolution
from cllip_fast.train.orderings import CLEAR, SMALLEST, Values, effect, first_reaching, judge
from cllip_fast.train.variants import (
    CLAIMS,
    COMPOSED,
    CURVES,
    DOTS,
    EFFECTS,
    GROUPS,
    LEFT_OUT,
    PAIRS,
    PLATEAU,
    SINGLE,
    TABLE,
    VARIANTS,
)

CEILING = 97.0  # percent from which a metric hardly tells variants apart
STUCK = 50.0  # percent of grounding below which its plateau has hardly been left

Records = Mapping[str, Sequence[dict]]  # variant -> results.json of each seed so far
Curves = Mapping[str, Mapping[str, Curve]]  # variant -> metric -> curve


@dataclass
class Study:
    """The runs so far, and what was asked for.

    Attributes:
        command: what makes them again.
        options: the trainer's options that all runs share.
        seeds: how many seeds a variant is to have.
        title: heads the page.
        records: variant -> results.json of each seed.
        folders: variant -> folder of each of these runs.
    """

    command: str
    options: Sequence[str]
    seeds: int
    title: str
    records: dict[str, list[dict]] = field(default_factory=dict)
    folders: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, variant: str, record: dict, folder: Path) -> None:
        """Take the run in `folder` in."""
        self.records.setdefault(variant, []).append(record)
        self.folders.setdefault(variant, []).append(folder)

    def write(self, page: Path) -> None:
        """Write the page, every run's results as JSON beside it, and its two pictures."""
        self.records = {name: self.records[name] for name in VARIANTS if name in self.records}
        values, curves = values_of(self.records, "val"), curves_of(self.folders, "val")
        titles = {name: VARIANTS[name].title for name in self.records}
        pictures = {kind: page.with_name(f"{page.stem}_{kind}.png") for kind in ("curves", "final")}
        groups = {title: [titles[name] for name in names if name in titles] for title, names in GROUPS.items()}
        by_title = {titles[name]: curves[name] for name in curves}
        variant_curves(groups, by_title, {metric: name_of(metric) for metric in CURVES}, pictures["curves"])
        ends = {titles[name]: values.get(name, {}) for name in self.records}
        variant_dots(ends, {metric: name_of(metric) for metric in DOTS}, pictures["final"])
        page.write_text(self.text(values, curves, {kind: path.name for kind, path in pictures.items()}))
        page.with_suffix(".json").write_text(json.dumps(self.records, indent=1) + "\n")

    def text(self, values: Values, curves: Curves, pictures: Mapping[str, str]) -> str:
        runs = [run for records in self.records.values() for run in records]
        config, seconds = runs[0]["config"], statistics.median(run["seconds"] for run in runs)
        sections = {
            f"# {self.title}": [
                f"`{self.command}`",
                "",
                f"{environment()}; {config['steps']} steps of {config['batch_size']} images a run, {seconds:.0f} s in "
                "the median, on scenes of difficulty `hard` (`cllip_fast/data/scene.py`).",
                "",
                *limits(values, self.records, self.seeds),
                *full(self.records),
                *resolution(runs[0]["results"]),
            ],
            "## The paper's orderings": [
                f"Differences in points on `val` ± the combined spread √(s² + s²) of both sides' seeds, {SMALLEST:g} "
                f"points at least; a verdict where the difference is more than {CLEAR:g} such spreads from the bound. "
                f"*{name_of('region_average').capitalize()}*: recognition, region → text R@10 and text → region R@10. "
                "The paper's figures are ViT-B/16's on photographs: directions compare, sizes do not.",
                "",
                *orderings(values),
            ],
            "## What each change does": [
                f"Points on `val` ± combined spread; bold beyond {CLEAR:g} spreads.",
                "",
                *effects(values),
            ],
            "## What ends the plateau": plateau(values, curves),
            "## Where they end": [
                f"![Final metrics of each variant, seed by seed]({pictures['final']})",
                "",
                "Mean ± sample standard deviation over seeds, percent. Variants without a region loss are read by "
                "RoIAlign of their patch features, which has nothing to train; the Prompter of *CLIP + grounding* was "
                "never shown what a region is called, so its regions are not read. On `unseen`, where 68 phrases share "
                "all regions, text → region R@10 says nothing and is left out.",
                *(line for split in runs[0]["results"] for line in ["", *final_table(self.records, split)]),
            ],
            "## On the way": [f"![Metrics of each variant over training]({pictures['curves']})"],
            "## Options": [
                f"All runs: `{shlex.join(self.options)}`",
                "",
                *(f"* **{VARIANTS[name].title}** (`{name}`): `{VARIANTS[name].flags}`" for name in self.records),
            ],
        }
        return "\n".join("\n".join([title, "", *lines, ""]) for title, lines in sections.items() if lines)


def name_of(metric: str) -> str:
    """A metric's name for people, those of `COMPOSED` included."""
    return COMPOSED[metric][0] if metric in COMPOSED else label(metric).replace("– ", "recognition, ")


def parts_of(metric: str) -> tuple[str, ...]:
    """The measured metrics whose mean it is."""
    return COMPOSED[metric][1] if metric in COMPOSED else (metric,)


def columns_of(split: str) -> list[str]:
    """The metrics of a split's table."""
    return [metric for metric in TABLE if metric not in LEFT_OUT.get(split, ())]


def answers(variant: str, metric: str) -> bool:
    """Whether a variant's figure means anything: those of regions need something that reads them."""
    return VARIANTS[variant].reads_regions or not metric.startswith(("recognition", "r2t", "t2r", "region"))


def values_of(records: Records, split: str) -> dict[str, dict[str, list[float]]]:
    """Every metric of every variant as one value a seed, in percent; what a variant cannot answer is left out."""
    values: dict[str, dict[str, list[float]]] = {}
    for name, runs in records.items():
        measured = [run["results"][split] for run in runs]
        values[name] = {
            metric: [100 * statistics.mean(metrics[part] for part in parts_of(metric)) for metrics in measured]
            for metric in [*measured[0], *COMPOSED]
            if metric not in COUNTS
            and answers(name, metric)
            and all(metrics.get(part) is not None for metrics in measured for part in parts_of(metric))
        }
    return values


def curves_of(folders: Mapping[str, Sequence[Path]], split: str) -> dict[str, dict[str, Curve]]:
    """The metrics of `CURVES` at every evaluation, mean over seeds, in percent."""
    curves: dict[str, dict[str, Curve]] = {}
    for name, runs in folders.items():
        logs = [read_log(run / "log.jsonl")[1].get(split, {}) for run in runs]
        for metric in CURVES:
            parts = parts_of(metric)
            if answers(name, metric) and all(part in log for log in logs for part in parts):
                rows = zip(*(log[part][1] for log in logs for part in parts), strict=True)
                means = [100 * statistics.mean(row) for row in rows]
                curves.setdefault(name, {})[metric] = (logs[0][parts[0]][0], means)
    return curves


def limits(values: Values, records: Records, seeds: int) -> list[str]:
    """What these runs can and cannot show, from their number and their figures."""
    lines, counts = [], [len(runs) for runs in records.values()]
    if max(counts) == 1:
        lines.append("* **One seed: it shows how large differences are, and decides none of them.**")
    elif min(counts) < seeds:
        lines.append(f"* **Partial: {min(counts)} to {max(counts)} of {seeds} seeds; the tables say how many.**")
    elif seeds == 2:
        lines.append("* Two seeds a side: chance alone makes one difference in nine look clear (three seeds: 1 in 40).")
    missing = [f"*{variant.title}*" for variant in VARIANTS.values() if variant.name not in records]
    if missing:
        lines.append(f"* Not run: {', '.join(missing)}.")
    if "recognition_top1" in values.get("clip", {}):
        share = statistics.mean(values["clip"]["recognition_top1"])
        lines.append(f"* CLIP only recognises {share:.1f} % of regions by RoIAlign of its patches (chance: 0.2 %).")
    boxes = [statistics.mean(ends["grounding_acc50"]) for ends in values.values() if "grounding_acc50" in ends]
    if boxes and max(boxes) < STUCK:
        lines.append(
            f"* Predicted boxes: {max(boxes):.1f} % at best with IoU ≥ 0.5. These runs end about where grounding "
            "leaves its plateau; what it does beyond is not shown."
        )
    return lines


def full(records: Records) -> list[str]:
    """One line a split: the metrics with little room left, and for how many variants that is so."""
    lines = []
    for split in next(iter(records.values()))[0]["results"]:
        values = values_of(records, split)
        counts = {
            metric: sum(statistics.mean(ends.get(metric, [0.0])) >= CEILING for ends in values.values())
            for metric in columns_of(split)
        }
        names = [f"{name_of(metric)} ({count} of {len(values)} variants)" for metric, count in counts.items() if count]
        lines.append(
            f"* At {CEILING:g} % or more on `{split}`, where differences hardly show: {', '.join(names) or 'nothing'}."
        )
    return lines


def orderings(values: Values) -> list[str]:
    """The paper's claims beside what was measured."""
    lines = ["| the paper's ordering | metric | published | here | verdict |", "|---|---|---:|---:|---|"]
    for claim in CLAIMS:
        measured, verdict = judge(claim, values)
        sides = f"*{VARIANTS[claim.variant].title}* against *{VARIANTS[claim.base].title}*"
        row = (f"{claim.text}: {sides}", name_of(claim.metric), claim.published, str(measured or "–"), verdict)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def effects(values: Values) -> list[str]:
    """What each change does, and which did not pay."""
    lines = [f"| change | from | to | {' | '.join(map(name_of, EFFECTS))} | |"]
    lines.append("|---|---|---|" + "---:|" * len(EFFECTS) + "---|")
    unpaid = []
    for what, variant, base in PAIRS:
        if variant not in values or base not in values:
            continue
        changes, verdict = effect(variant, base, values, EFFECTS)
        cells = []
        for metric in EFFECTS:
            change = changes.get(metric)
            clear = change is not None and change.above(0) is not None
            cells.append(f"**{change}**" if clear else str(change or "–"))
        row = (what, VARIANTS[base].title, VARIANTS[variant].title, *cells, verdict)
        lines.append(f"| {' | '.join(row)} |")
        if verdict in ("costs", "no clear difference"):
            unpaid.append(f"{what} on top of *{VARIANTS[base].title}* ({verdict})")
    return [*lines, "", f"Did not pay: {', '.join(unpaid) or 'none of those that were decided'}."]


def plateau(values: Values, curves: Curves) -> list[str]:
    """At which step each single loss has reached half of where everything together ends."""
    if "all" not in curves:
        return []
    goals = {metric: statistics.mean(values["all"][metric]) / 2 for metric in PLATEAU}
    lines = [
        "First evaluation, in steps, at which the mean over seeds has half of what *everything* ends with.",
        "",
        f"| variant | {' | '.join(f'{name_of(metric)} ≥ {goal:.1f}' for metric, goal in goals.items())} |",
        "|---|" + "---:|" * len(goals),
    ]
    for name in ("clip", *SINGLE, "all"):
        if name not in curves:
            continue
        cells = [
            str(first_reaching(*curves[name][metric], goal) or "not reached") if metric in curves[name] else "–"
            for metric, goal in goals.items()
        ]
        lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} |")
    return lines


def final_table(records: Records, split: str) -> list[str]:
    """Every variant's mean ± sample standard deviation in the split's `columns_of`, and of how many seeds."""
    values, columns = values_of(records, split), columns_of(split)
    lines = [f"| {split} | seeds | {' | '.join(map(name_of, columns))} |", "|---|---:|" + "---:|" * len(columns)]
    for name, runs in records.items():
        cells = [cell([value / 100 for value in values[name].get(metric, [])]) for metric in columns]
        lines.append(f"| {VARIANTS[name].title} | {len(runs)} | {' | '.join(cells)} |")
    return lines
