"""Verdicts from constructed seeds: clear differences, some within the spread, one seed, which changes pay."""

from __future__ import annotations

import math

import pytest

from cllip_fast.train.orderings import SMALLEST, Claim, difference, effect, first_reaching, judge

PROMPTER = Claim("Prompter above RoIAlign", "prompter", "roi_align", "t2r_r10", 10, "+42.9")


def verdict(prompter: list[float], roi_align: list[float]) -> str:
    return judge(PROMPTER, {"prompter": {"t2r_r10": prompter}, "roi_align": {"t2r_r10": roi_align}})[1]


def test_a_difference_has_the_spread_of_both_sides() -> None:
    found = difference([70.0, 74.0, 78.0], [50.0, 53.0, 56.0])
    assert found.mean == pytest.approx(21)
    assert found.spread == pytest.approx(math.hypot(4, 3))  # sample deviations 4 and 3
    assert str(found) == "+21.0 ± 5.0"
    assert found.above(10) is True  # 11 points off the bound, two spreads are 10
    assert found.above(11.5) is None
    assert found.above(40) is False


def test_seeds_that_agree_by_chance_do_not_make_a_small_difference_clear() -> None:
    found = difference([50.4, 50.4], [50.0, 50.0])
    assert found.spread == SMALLEST
    assert found.above(0) is None
    assert difference([52.0, 52.0], [50.0, 50.0]).above(0) is True


def test_one_seed_decides_nothing_and_none_is_no_difference() -> None:
    assert difference([90.0], [10.0, 10.1]).above(0) is None
    assert str(difference([90.0], [10.0])) == "+80.0"
    assert difference([], [10.0]) is None


def test_verdicts_on_a_claim() -> None:
    assert verdict([80.0, 81.0], [60.0, 61.0]) == "**holds**"
    assert verdict([65.0, 65.5], [60.0, 60.5]) == "**does not hold**"  # above, but by less than the ten points claimed
    assert verdict([40.0, 41.0], [60.0, 61.0]) == "**does not hold**"
    assert verdict([60.0, 90.0], [60.0, 61.0]) == "undecided: within the spread"
    assert verdict([80.0], [60.0, 61.0]) == "undecided: one seed"
    assert verdict([80.0, 81.0], []) == "not run"
    assert judge(PROMPTER, {}) == (None, "not run")


def test_costing_at_most_a_point_holds_for_a_gain_too() -> None:
    claim = Claim("costs at most a point", "cloc", "clip", "i2t_r1", -1, "+2.9")
    clip = {"i2t_r1": [50.0, 50.2]}
    for cloc, wanted in (
        ([60.0, 60.2], "**holds**"),
        ([44.0, 44.2], "**does not hold**"),
        ([49.0, 49.2], "undecided: within the spread"),
    ):
        assert judge(claim, {"cloc": {"i2t_r1": cloc}, "clip": clip})[1] == wanted


def test_a_change_pays_costs_both_or_neither() -> None:
    values = {
        "base": {"a": [10.0, 10.2], "b": [50.0, 50.2]},
        "better": {"a": [30.0, 30.2], "b": [50.0, 50.2]},
        "mixed": {"a": [30.0, 30.2], "b": [20.0, 20.2]},
        "worse": {"a": [10.0, 10.2], "b": [20.0, 20.2]},
        "same": {"a": [10.1, 10.3], "b": [50.0, 50.2]},
        "single": {"a": [99.0], "b": [99.0]},
        "blind": {},
    }
    words = {name: effect(name, "base", values, ("a", "b"))[1] for name in values}
    assert words == {
        "base": "no clear difference",
        "better": "pays",
        "mixed": "pays and costs",
        "worse": "costs",
        "same": "no clear difference",
        "single": "undecided: one seed",
        "blind": "–",
    }


def test_the_first_step_at_a_level() -> None:
    assert first_reaching([100, 200, 300], [5.0, 25.0, 24.0], 24.5) == 200
    assert first_reaching([100, 200, 300], [5.0, 25.0, 24.0], 30.0) is None
