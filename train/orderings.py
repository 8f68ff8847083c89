"""What several seeds let one say: differences against their spread, and which of the paper's orderings hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CLEAR = 2.0  # a difference is clear beyond this many combined spreads; of three seeds each, chance does so 1 time in 40
SMALLEST = 0.5  # points: two or three seeds that happen to agree do not make a spread smaller than this

Values = Mapping[str, Mapping[str, Sequence[float]]]  # variant -> metric -> one value a seed, in percent


@dataclass(frozen=True)
class Difference:
    """A mean difference in points; `spread` is √(s_a² + s_b²) of the sample deviations, at least `SMALLEST`.

    The spread is None with one seed on a side.
    """

    mean: float
    spread: float | None

    def above(self, bound: float) -> bool | None:
        """Whether the difference is clearly above the bound (True) or below it (False); None: the seeds do not tell."""
        if self.spread is None or abs(self.mean - bound) <= CLEAR * self.spread:
            return None
        return self.mean > bound

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


def difference(values: Sequence[float], base: Sequence[float]) -> Difference | None:
    """How far `values` are above `base`; None where either is empty."""
    if not values or not base:
        return None
    known = len(values) > 1 and len(base) > 1
    spread = max(SMALLEST, math.hypot(statistics.stdev(values), statistics.stdev(base))) if known else None
    return Difference(statistics.mean(values) - statistics.mean(base), spread)


@dataclass(frozen=True)
class Claim:
    """One ordering of the paper: `variant` is more than `bound` points above `base` in `metric`."""

    text: str
    variant: str
    base: str
    metric: str
    bound: float
    published: str


def judge(claim: Claim, values: Values) -> tuple[Difference | None, str]:
    """The difference that was measured, and the verdict on the claim in words."""
    measured = difference(*(values.get(name, {}).get(claim.metric, ()) for name in (claim.variant, claim.base)))
    if measured is None:
        return None, "not run"
    if measured.spread is None:
        return measured, "undecided: one seed"
    return measured, {True: "**holds**", False: "**does not hold**", None: "undecided: within the spread"}[
        measured.above(claim.bound)
    ]


def effect(variant: str, base: str, values: Values, metrics: Sequence[str]) -> tuple[dict[str, Difference], str]:
    """What `variant` changes against `base` in each metric that both have, and whether it pays, in words."""
    found = {metric: difference(values[variant].get(metric, ()), values[base].get(metric, ())) for metric in metrics}
    changes = {metric: change for metric, change in found.items() if change is not None}
    if not changes:
        return changes, "–"
    if any(change.spread is None for change in changes.values()):
        return changes, "undecided: one seed"
    clear = {change.above(0) for change in changes.values()}
    words = {True: "pays", False: "costs"}
    return changes, " and ".join(words[sign] for sign in (True, False) if sign in clear) or "no clear difference"


def first_reaching(steps: Sequence[int], values: Sequence[float], level: float) -> int | None:
    """The first step at which a curve is at `level` or above."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), None)
