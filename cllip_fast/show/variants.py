"""Pictures of a study: learning curves of its variants, and where each ended, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllip_fast import extras

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[int], Sequence[float]]  # steps, percent

_COLOURS = ("#5b5b66", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f")
_MARKERS = "osD^vP*X"


def variant_curves(
    groups: Mapping[str, Sequence[str]],
    curves: Mapping[str, Mapping[str, Curve]],
    metrics: Mapping[str, str],
    path: str | Path,
) -> Path:
    """Metrics over training: a column of panels for each group of variants, a row for each metric.

    Args:
        groups: title -> names of variants, at most eight; those without curves are left out.
        curves: variant -> metric -> curve.
        metrics: metric -> title.
        path: the picture to write.

    Raises:
        InputError: matplotlib is absent.
    """
    figure = _figure(width=5.2 * len(groups), height=3.1 * len(metrics))
    axes = figure.subplots(len(metrics), len(groups), sharex=True, sharey="row", squeeze=False)
    for column, (group, names) in enumerate(groups.items()):
        lines = {}
        for row, (metric, title) in enumerate(metrics.items()):
            panel = axes[row, column]
            for place, name in enumerate(names):
                if metric in curves.get(name, {}):
                    steps, values = curves[name][metric]
                    look = {"color": _COLOURS[place], "marker": _MARKERS[place], "markersize": 4, "linewidth": 1.6}
                    lines[name] = panel.plot(steps, values, **look)[0]
            panel.set_title(f"{title}" + (f" — {group}" if row == 0 else ""), loc="left", fontsize=10)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            if column == 0:
                panel.set_ylabel("%")
            if row == len(metrics) - 1:
                panel.set_xlabel("step")
        if lines:  # one legend a column, beneath it, where it hides no curve
            beneath = {"loc": "upper left", "bbox_to_anchor": (0, -0.2)}
            axes[-1, column].legend(lines.values(), lines.keys(), fontsize=9, frameon=False, **beneath)
    return _save(figure, path)


def variant_dots(
    values: Mapping[str, Mapping[str, Sequence[float]]], metrics: Mapping[str, str], path: str | Path
) -> Path:
    """Where each variant ended: a panel for each metric, a row for each variant; rings are seeds.

    Args:
        values: variant -> metric -> one value a seed, in percent.
        metrics: metric -> title.
        path: the picture to write.

    Raises:
        InputError: matplotlib is absent.
    """
    figure = _figure(width=1.6 + 2.5 * len(metrics), height=1.1 + 0.32 * len(values))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, (metric, title) in zip(axes, metrics.items(), strict=True):
        for row, name in enumerate(values):
            seeds = values[name].get(metric, ())
            if not seeds:
                continue
            panel.scatter(seeds, [row] * len(seeds), s=26, facecolors="none", edgecolors=_COLOURS[6], linewidths=1.2)
            spread = statistics.stdev(seeds) if len(seeds) > 1 else math.nan
            mean = statistics.mean(seeds)
            panel.errorbar(mean, row, xerr=spread, fmt="o", color=_COLOURS[1], markersize=5, capsize=3)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(-3, 103)
        panel.set_xlabel("%")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(values)), list(values))
    axes[0].invert_yaxis()
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    extras.require("matplotlib", "pictures of a study")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # a figure of its own, so that no global plotting state is touched
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
