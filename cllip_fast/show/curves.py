"""Training curves from a run's log: small multiples over steps."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.evaluate.table import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[str, tuple[list[int], list[float]]]  # name -> steps, values

COLUMNS = 3
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b66", "#8c6d1f")
_SPLIT_STYLES = (("-", "o", "solid ●"), ("--", "s", "dashed ■"), (":", "^", "dotted ▲"), ("-.", "D", "dash-dotted ◆"))


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        title, unit: above it, and at its vertical axis.
        names: figures of the training lines, or metrics of the evaluation lines; `*` in a name stands for anything.
            Those that the log lacks are left out, and so is a panel without any.
        of_splits: the names are metrics, drawn for each split.
        factor: values are multiplied with it.
        log: logarithmic vertical axis.
        from_zero: the vertical axis starts at 0.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    of_splits: bool = False
    factor: float = 1.0
    log: bool = False
    from_zero: bool = False


PANELS = (
    Panel("Loss", "sum of the weighted parts", ("loss",)),
    Panel("Parts of the loss", "weighted", ("*_loss",)),
    Panel("Learning rate", "step size", ("lr",)),
    Panel("Logit scales", "exp(log scale)", ("logit_scale", "region_logit_scale")),
    Panel("Gradient norm, before clipping", "L2 norm", ("grad_norm",), log=True),
    Panel("Speed", "images/s", ("images_per_s",), from_zero=True),
    Panel("Waiting for data", "% of a step", ("data_wait",), factor=100.0, from_zero=True),
    Panel("Image–text retrieval", "%", ("i2t_r1", "t2i_r1"), of_splits=True, factor=100.0),
    Panel("Region recognition", "%", ("recognition_*",), of_splits=True, factor=100.0),
    Panel("Region–text retrieval", "%", ("r2t_r1", "r2t_r10", "t2r_r1", "t2r_r10"), of_splits=True, factor=100.0),
    Panel("Localisation", "%", ("grounding_acc50", "grounding_iou", "pointing"), of_splits=True, factor=100.0),
)


def read_log(path: str | Path) -> tuple[Series, dict[str, Series]]:
    """Figures of a run's JSONL log.

    A step that was logged twice, as after a resumed run, counts as it was logged last. A last line that is cut off,
    as by a killed run, is left out. Values that are not finite numbers are left out.

    Returns:
        figures of the training lines by name, and of the evaluation lines by split and name; steps ascending.

    Raises:
        InputError: no such file, or a line (not the last) that is no JSON object with a step.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"jsonl_path is {path}, which is not a file")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    points: dict[str | None, dict[str, dict[int, float]]] = {None: {}}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
            figures = points.setdefault(record.get("split"), {})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}, line {number} is {line[:60]!r}, expected a JSON object with a step") from error
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                figures.setdefault(name, {})[step] = value
    series = {
        split: {name: (sorted(at), [at[step] for step in sorted(at)]) for name, at in figures.items()}
        for split, figures in points.items()
    }
    return series.pop(None), series


def training_curves(jsonl_path: str | Path, png_path: str | Path) -> Path:
    """Draw losses, learning rate, scales, gradient norm, speed and evaluation metrics of a run over its steps.

    Args:
        jsonl_path: the trainer's log.
        png_path: the picture; missing folders are made.

    Returns:
        the picture's path.

    Raises:
        InputError: matplotlib is absent, the log cannot be read (`read_log`), or holds nothing to draw.
    """
    extras.require("matplotlib", "training_curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training, splits = read_log(jsonl_path)
    panels = [
        (panel, names)
        for panel in PANELS
        if (names := find_names(panel, splits.values() if panel.of_splits else [training]))
    ]
    if not panels:
        raise InputError(f"{jsonl_path} holds no figures that could be drawn")
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # a figure of its own, so that no global plotting state is touched
    last = max(steps[-1] for series in (training, *splits.values()) for steps, _ in series.values())
    for place, (panel, names) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        draw_panel(axes, panel, names, splits if panel.of_splits else {"": training})
        axes.set_xlim(0, last * 1.02)
    path = Path(png_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def find_names(panel: Panel, logs: Iterable[Series]) -> list[str]:
    """The panel's names that any of the logs holds."""
    held = list(dict.fromkeys(name for series in logs for name in series))
    chosen = []
    for pattern in panel.names:
        before, star, after = pattern.partition("*")
        chosen += [n for n in held if (n.startswith(before) and n.endswith(after) if star else n == pattern)]
    return chosen


def draw_panel(axes: Axes, panel: Panel, names: list[str], logs: dict[str, Series]) -> None:
    """One line for each name and log; colours tell names, line styles logs."""
    styles = dict(zip(logs, itertools.cycle(_SPLIT_STYLES), strict=False))
    for k, name in enumerate(names):
        in_legend = False
        for split, series in logs.items():
            if name not in series:
                continue
            steps, values = series[name]
            axes.plot(
                steps,
                [panel.factor * value for value in values],
                linestyle=styles[split][0],
                color=_COLOURS[k % len(_COLOURS)],
                linewidth=1.5,
                marker=styles[split][1] if panel.of_splits and len(steps) <= 30 else None,
                markersize=3.5,
                label=None if in_legend else short_label(name, panel),
            )
            in_legend = True
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    if panel.of_splits:
        axes_key = ",  ".join(f"{key} {split}" for split, (_, _, key) in styles.items())
        axes.set_title(axes_key, loc="right", fontsize=8.5, color="#5b5b66")
        axes.set_ylim(-2, 102)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.log:
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2 if len(names) > 5 else 1)


def short_label(name: str, panel: Panel) -> str:
    """A figure's name beside its line, without what the panel's title says already."""
    if not panel.of_splits:
        return name.removesuffix("_loss").replace("_", " ")
    return label(name).removeprefix("– ").removeprefix(f"{panel.title.lower()}, ")
