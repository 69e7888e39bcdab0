"""Fronts along the prices of time: policies at equal accuracy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from fronts import make_front

from pacevlm.evaluation.fronts import POINTS_BELOW, Front, latency_at, summarise_fronts

PRICES = (0.0, 2.0, 8.0, 32.0)


def test_points_between_two_of_a_front_count_and_what_is_not_reached_does_not() -> None:
    accuracy, latency_ms = [0.9, 0.8, 0.6], [20.0, 12.0, 8.0]
    targets = [0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.1]
    expected = [np.nan, 20.0, 16.0, 12.0, 10.0, 8.0, 8.0]
    found = [float(latency_at(accuracy, latency_ms, target)) for target in targets]
    np.testing.assert_allclose(found, expected)
    # A point that others beat adds nothing.
    assert latency_at([*accuracy, 0.7], [*latency_ms, 19.0], 0.7) == pytest.approx(10.0)
    together = latency_at(np.tile(accuracy, (2, 1)), np.tile(latency_ms, (2, 1)), [0.85, 0.7])
    np.testing.assert_allclose(together, [16.0, 10.0])


@pytest.fixture
def fronts() -> dict[str, Front]:
    return {"controller": make_front(), "lookup_table": make_front(slower=1.25), "fixed": make_front(slower=2.0)}


def test_fronts_are_compared_at_equal_accuracy(fronts: dict[str, Front]) -> None:
    full = make_front().accuracy[0]
    found = summarise_fronts(fronts, full, PRICES, budget_ms=50.0, default_price=2.0, num_resamples=300)
    assert found["prices"] == list(PRICES)
    controller = found["policies"]["controller"]
    assert [point["accuracy"]["mean"] for point in controller] == pytest.approx([0.9, 0.88, 0.85, 0.7])
    assert [row["points_below"] for row in found["equal_accuracy"]] == list(POINTS_BELOW)
    for row in found["equal_accuracy"]:
        # The same answers, slower by a factor: the ratio is known, and has no spread.
        for name, ratio in (("lookup_table", 0.8), ("fixed", 0.5)):
            assert row["ratio"][name] == pytest.approx({"mean": ratio, "low": ratio, "high": ratio})
            assert row["mean_ms"]["controller"] == pytest.approx(ratio * row["mean_ms"][name])
    assert found["equal_accuracy"][0]["mean_ms"]["controller"] == pytest.approx(controller[1]["latency_ms"]["mean"])
    assert found["default"]["price"] == 2.0
    assert found["default"]["change"]["mean"] == pytest.approx(-0.02)
    assert found["default"]["latency_ratio"]["mean"] == pytest.approx(0.8)
    json.dumps(found, allow_nan=False)


def test_what_no_price_reaches_is_none(fronts: dict[str, Front]) -> None:
    low = Front(np.zeros_like(fronts["fixed"].accuracy), fronts["fixed"].latency_ms)
    found = summarise_fronts({**fronts, "fixed": low}, np.ones(300), PRICES, budget_ms=50.0, num_resamples=100)
    for row in found["equal_accuracy"]:
        assert row["mean_ms"]["fixed"] is None
        assert row["ratio"]["fixed"] is None
    alone: dict[str, Any] = summarise_fronts({"fixed": low}, np.ones(300), PRICES, budget_ms=50.0, num_resamples=100)
    assert alone["default"] is None
    json.dumps([found, alone], allow_nan=False)
