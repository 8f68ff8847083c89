"""The learning rate at the points one would check by hand."""

from __future__ import annotations

import pytest

from cllip_fast.train.config import Config
from cllip_fast.train.optimizer import learning_rate


def test_warm_up_then_cosine_to_zero() -> None:
    config = Config(lr=2.0, warmup=10, steps=110)
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(9, config) == pytest.approx(2.0)
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(1.0)
    assert learning_rate(110, config) == pytest.approx(0.0)
    rates = [learning_rate(step, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up() -> None:
    assert learning_rate(0, Config(lr=2.0, warmup=0, steps=10)) == pytest.approx(2.0)
