"""Curves as SVG: the panels of `show.curves`, drawn small, in colours that the page's light and dark style sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cllip_fast.report.html import Html, tag
from cllip_fast.show.curves import PANELS, Panel, Series, find_names, short_label

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 8, 24  # margins around the plot
COLOURS = 8  # classes c0 to c7 of the page's style
DASHES = (None, "6 4", "2 3", "9 3 2 3")  # a split each
MARKED_POINTS = 30  # up to so many, points are marked

Line = tuple[str, str, list[int], list[float]]  # name, split, steps, values


def curves(training: Series, splits: dict[str, Series]) -> list[Html]:
    """A figure for each panel of which the log holds something."""
    figures = []
    for panel in PANELS:
        logs = splits if panel.of_splits else {"": training}
        names = find_names(panel, logs.values())
        lines = [
            (name, split, series[name][0], [panel.factor * value for value in series[name][1]])
            for name in names
            for split, series in logs.items()
            if name in series and (not panel.log or min(series[name][1]) > 0)
        ]
        if lines:
            figures.append(_figure(panel, names, list(logs), lines))
    return figures


def _figure(panel: Panel, names: list[str], splits: list[str], lines: list[Line]) -> Html:
    last = max(line[2][-1] for line in lines)
    low, high = _limits(panel, [value for line in lines for value in line[3]])
    scale = math.log10 if panel.log else float

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(value) - scale(low)) / (scale(high) - scale(low)))

    parts = [tag("title", f"{panel.title}, {panel.unit}, over {last:,} steps")]
    for value in log_ticks(low, high) if panel.log else ticks(low, high):
        y = f"{y_of(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", shorten(value), x=LEFT - 6, y=y, dy="0.32em", text_anchor="end"))
    parts.append(tag("text", "step", x=LEFT - 8, y=HEIGHT - 6, text_anchor="end"))
    for step in ticks(0, last):
        anchor = "end" if x_of(step) > WIDTH - 2 * RIGHT else "middle"
        parts.append(tag("text", f"{step:,.6g}", x=f"{x_of(step):.1f}", y=HEIGHT - 6, text_anchor=anchor))
    for name, split, steps, values in lines:
        colour, dash = f"c{names.index(name) % COLOURS}", DASHES[splits.index(split) % len(DASHES)]
        kept = thin(steps, values, columns=WIDTH)
        places = [(f"{x_of(step):.1f}", f"{y_of(value):.1f}") for step, value in kept]
        points = " ".join(f"{x},{y}" for x, y in places)
        parts.append(tag("polyline", points=points, class_=colour, stroke_dasharray=dash))
        if len(kept) == 1 or (panel.of_splits and len(kept) <= MARKED_POINTS):
            for (x, y), (step, value) in zip(places, kept, strict=True):
                said = " ".join(filter(None, [split, short_label(name, panel)]))
                hint = tag("title", f"{said}, step {step:,}: {value:.4g}")
                parts.append(tag("circle", hint, cx=x, cy=y, r="2.5", class_=colour))
    drawing = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    caption = tag("figcaption", tag("strong", panel.title), " ", tag("span", panel.unit, class_="faint"))
    return tag("figure", caption, drawing, _legend(panel, names, splits), class_="chart")


def _legend(panel: Panel, names: list[str], splits: list[str]) -> Html | None:
    entries = []
    if len(names) > 1:
        entries += [(short_label(name, panel), f"c{k % COLOURS}", None) for k, name in enumerate(names)]
    if len(splits) > 1:
        entries += [(split, "ink", DASHES[k % len(DASHES)]) for k, split in enumerate(splits)]
    items = []
    for text, colour, dash in entries:
        stroke = tag("line", x1=0, x2=22, y1=4, y2=4, class_=colour, stroke_dasharray=dash)
        items.append(tag("li", tag("svg", stroke, viewBox="0 0 22 8", aria_hidden="true"), " ", text))
    return tag("ul", *items, class_="key") if items else None


def _limits(panel: Panel, values: Sequence[float]) -> tuple[float, float]:
    if panel.of_splits:
        return 0.0, 100.0
    low, high = min(values), max(values)
    if panel.log:
        return low / 1.1, high * 1.1
    low = min(0.0, low) if panel.from_zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if panel.from_zero else low - margin), high + margin


def shorten(value: float) -> str:
    """A number in at most seven characters, which is what the left margin holds."""
    plain = f"{value:.6g}"
    return plain if len(plain) <= 7 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, within [low, high]; at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    return [k * apart for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; all digits within half a decade, over two the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 100 else (1, 2, 5) if high / low > 5 else range(1, 10)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]


def thin(steps: Sequence[int], values: Sequence[float], columns: int) -> list[tuple[int, float]]:
    """At most two points a column of the drawing, its lowest and its highest: spikes stay."""
    points = list(zip(steps, values, strict=True))
    if len(points) <= 2 * columns:
        return points
    share = len(points) / columns
    kept = []
    for k in range(columns):
        column = points[math.ceil(k * share) : math.ceil((k + 1) * share)]
        ends = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
