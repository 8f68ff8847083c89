"""The page's tables: metrics, faults, options, environment."""

from __future__ import annotations

import platform
from dataclasses import fields

import torch

from cllip_fast import __version__, extras
from cllip_fast.evaluate.table import COUNTS, label
from cllip_fast.kernels import native
from cllip_fast.report.html import Html, join, note, table, tag
from cllip_fast.report.look import Findings
from cllip_fast.report.run import Run


def metrics_table(run: Run) -> Html:
    """The last evaluation, a row a metric."""
    if not run.metrics:
        return note("The run has not been evaluated.")
    names = list(dict.fromkeys(name for metrics in run.metrics.values() for name in metrics))
    rows = [[label(name), *(_metric(name, of.get(name)) for of in run.metrics.values())] for name in names]
    caption = f"Whole splits, after step {run.step:,}, in %" if run.step is not None else "Whole splits, in %"
    return table(["", *run.metrics], rows, caption=caption, numbers=True)


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if name in COUNTS else f"{100 * value:.1f}"


def faults_table(run: Run, findings: Findings) -> Html:
    """What the run and this page's evaluation left out or skipped."""
    figures = {name: values for name, (_, values) in run.training.items()}
    rows: list[list[object]] = []
    if "skipped" in figures:
        steps, shares = run.training["skipped"]
        lost = sum(share * (step - before) for step, before, share in zip(steps, [0, *steps[:-1]], shares, strict=True))
        rows.append(["steps skipped, their gradient not being finite", f"{lost:,.0f} of {steps[-1]:,}"])
    if "lr" in figures:
        lines, finite = len(figures["lr"]), len(figures.get("loss", []))
        rows.append(["lines of the log whose loss is not finite", f"{lines - finite:,} of {lines:,}"])
    if "samples_total" in figures:
        skipped, total = (int(figures[f"samples_{name}"][-1]) for name in ("skipped", "total"))
        rows.append(
            ["training samples left out as broken (first rank, since its last start)", f"{skipped:,} of {total:,}"]
        )
    for split in findings.splits:
        rows.append([f"left out of {split.name} for this page", f"{sum(split.skipped.values()):,}"])
        rows += [[f"– {kind}", f"{count:,}"] for kind, count in split.skipped.most_common()]
    if not rows:
        return note("The run has no log to count in.")
    return table(["what", "count"], rows, caption="Counted", numbers=True)


def options_tables(run: Run) -> Html:
    """The options that differ from the defaults, then, folded, all of them by group."""
    known = {field.name: field for field in fields(run.config)}
    groups: dict[str, list[list[object]]] = {}
    for name, value in run.options.items():
        field = known.get(name)
        changed = field is not None and value != field.default
        shown = tag("code", '""' if value == "" else value)
        row = [
            tag("span", name, class_="changed" if changed else None),
            shown,
            tag("code", '""' if field.default == "" else field.default) if changed else "",
            field.metadata["help"] if field else "not an option of this version",
        ]
        groups.setdefault(field.metadata["group"] if field else "other", []).append(row)
        if changed:
            groups.setdefault("", []).append(row)
    header = ["option", "value", "default, if another", "meaning"]
    changed = groups.pop("", [])
    tables = [table(header, rows, caption=group, class_="pairs") for group, rows in groups.items()]
    return join(
        table(header, changed, caption="Other than the defaults", class_="pairs") if changed else None,
        tag("details", tag("summary", "All options"), *tables),
    )


def environment_table(run: Run, findings: Findings) -> Html:
    """Where the run lies, its data, and what wrote the page."""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    rows: list[list[object]] = [
        ["folder of the run", tag("code", run.folder)],
        ["checkpoint", tag("code", run.checkpoint.name) if run.checkpoint else "none"],
        ["model", findings.model],
        ["training data", tag("code", run.config.train_data)],
        *([f"data of {name}", tag("code", spec)] for name, spec in findings.specs.items()),
        ["CLLIP-Fast", __version__],
        ["PyTorch", torch.__version__],
        ["Python", f"{platform.python_version()}, {platform.system()}"],
        ["hardware", hardware],
        ["optional packages", extras.report().replace("  ", ", ")],
        ["kernels", native.describe()],
    ]
    text = "Versions and hardware are those that wrote this page; a run does not record the ones that trained it."
    return join(
        table(["what", "value"], [row for row in rows if row[1]], caption="Run and page", class_="pairs"),
        tag("p", text, class_="faint"),
    )
