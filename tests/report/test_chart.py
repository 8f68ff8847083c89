"""Curves as SVG: points where the log has them, round ticks, spikes that stay."""

from __future__ import annotations

import re

import pytest

from cllip_fast.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curves, log_ticks, shorten, thin, ticks


def points(figure: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]*)"', figure)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_lines_lie_where_the_log_has_them() -> None:
    training = {"data_wait": ([10, 20, 40], [0.0, 0.5, 1.0]), "grad_norm": ([20, 40], [1.0, 100.0])}
    norm, wait = curves(training, {})
    ((first, second),) = points(norm)
    assert first[0] == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 2, abs=0.1)
    assert second[0] == pytest.approx(WIDTH - RIGHT, abs=0.1)
    (line,) = points(wait)
    zero = HEIGHT - BOTTOM
    assert [x for x, _ in line] == pytest.approx(
        [LEFT + (WIDTH - LEFT - RIGHT) * s / 40 for s in (10, 20, 40)], abs=0.1
    )
    assert line[0][1] == pytest.approx(zero, abs=0.1), "from zero"
    assert zero - line[1][1] == pytest.approx((zero - line[2][1]) / 2, abs=0.1)
    assert line[2][1] > TOP
    assert ">100</text>" in wait, "in percent"
    assert ">step</text>" in wait


def test_labels_fit_into_the_margin() -> None:
    said = {
        0.00084: "0.00084",
        0.000812: "8.1e-4",
        -0.000812: "-8.1e-4",
        1.5e-5: "1.5e-05",
        2e6: "2e+06",
        14.26: "14.26",
    }
    assert {value: shorten(value) for value in said} == said
    assert shorten(1234567.0) == "1.2e6"


def test_splits_have_lines_and_a_legend() -> None:
    one = {"i2t_r1": ([5, 10], [0.5, 1.0]), "t2i_r1": ([5, 10], [0.0, 0.25])}
    (figure,) = curves({}, {"val": one, "a <b>": {"i2t_r1": ([10], [0.75])}})
    assert len(points(figure)) == 3
    assert [y for _, y in points(figure)[0]] == pytest.approx([TOP + (HEIGHT - TOP - BOTTOM) / 2, TOP], abs=0.1)
    assert figure.count("<circle") == 5
    assert "a &lt;b&gt; image → text R@1, step 10: 75" in figure
    assert figure.count("<li>") == 2 + 2
    assert curves({}, {}) == []


def test_flat_and_single_values_can_be_drawn() -> None:
    for values in ([0.0], [3.0], [-2.0], [1e-12]):
        (figure,) = curves({"loss": ([7], values)}, {})
        assert len(points(figure)[0]) == 1
        assert "nan" not in figure
    assert curves({"grad_norm": ([1, 2], [0.0, 1.0])}, {}) == [], "no logarithm of 0"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 0.0021, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (-3, 3, [-2, 0, 2]),
        (4, 4, [4]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks() -> None:
    assert log_ticks(0.5, 40) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(0.01, 200) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert log_ticks(5.2, 12) == pytest.approx([6, 7, 8, 9, 10])


def test_thinning_keeps_spikes() -> None:
    steps, values = range(10_000), [1.0] * 10_000
    values[1234], values[7777] = 50.0, -50.0
    kept = thin(steps, values, columns=100)
    assert len(kept) <= 200
    assert (1234, 50.0) in kept
    assert (7777, -50.0) in kept
    assert kept == sorted(kept)
    assert thin(steps[:150], values[:150], columns=100) == list(zip(steps[:150], values[:150], strict=True))
