"""Prices of time: what is measured of them, and which is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fronts import make_front

from pacevlm.errors import CheckpointError, ConfigError, DataError
from pacevlm.evaluation.prices import DEFAULT_COST, PricePoint, PriceTable
from pacevlm.evaluation.statistics import Interval, paired_bootstrap

PRICES = (0.0, 2.0, 8.0, 32.0)


def made_up(*costs: float) -> PriceTable:
    points = [
        PricePoint(float(2**i - 1), Interval(cost, cost - 1, cost + 1), Interval(1 - i / 10, 0.1, 1.0))
        for i, cost in enumerate(costs)
    ]
    return PriceTable(tuple(points), 100, 20.0)


def test_cost_and_latency_are_paired_with_no_price() -> None:
    front = make_front()
    table = PriceTable.measure(PRICES, front, 40.0, seed=3)
    assert [point.price for point in table.points] == list(PRICES)
    assert [point.cost.mean for point in table.points] == pytest.approx([0.0, 2.0, 5.0, 20.0])
    assert table.points[0].cost == Interval(0.0, 0.0, 0.0)
    expected = paired_bootstrap(100 * front.accuracy[0], 100 * front.accuracy[2], seed=3)
    assert table.points[2].cost == pytest.approx(expected) or table.points[2].cost.low == pytest.approx(expected.low)
    for point, share in zip(table.points, (1.0, 0.8, 0.6, 0.3), strict=True):
        assert point.latency.mean == pytest.approx(share * front.latency_ms[0].mean() / 40.0)
        assert point.latency.low < point.latency.mean < point.latency.high
    assert table.num_examples == 300


@pytest.mark.parametrize(
    ("costs", "place"),
    [
        ((0.0, 0.05, 0.1, 0.2, 3.0), 2),
        ((0.0, 0.05, 0.1, 0.0, 0.1), 4),
        ((0.0, -0.5, -0.2, 0.05, 0.11), 3),
        ((0.0, 0.11, 0.0, 0.0, 0.0), 0),  # a lower price was seen to cost more, so the higher ones were lucky
        ((0.0,), 0),
    ],
)
def test_the_default_is_the_highest_price_that_costs_little_up_to_which_all_do(
    costs: tuple[float, ...], place: int
) -> None:
    table = made_up(*costs)
    assert table.default_price == table.points[place].price
    assert table.costing(DEFAULT_COST) == table.points[place]
    assert table.costing(100.0) == table.points[-1]
    assert table.costing(0) == table.points[max(i for i in range(len(costs)) if max(costs[: i + 1]) <= 0)]


def test_a_mean_latency_gets_the_lowest_price_that_keeps_it() -> None:
    table = made_up(0.0, 0.1, 0.5, 1.0)  # mean latencies of 20, 18, 16 and 14 ms
    for mean_ms, place in ((50, 0), (20.0, 0), (19.9, 1), (18.0, 1), (np.float32(14.5), 3)):
        assert table.taking(mean_ms) == table.choose(mean_ms=mean_ms) == table.points[place]
    assert table.choose(points=0.5) == table.points[2]
    with pytest.raises(ConfigError, match="the least is 14 ms"):
        table.taking(13.9)
    for mean_ms in (0, -1.0, np.nan, np.inf, "18", True):
        with pytest.raises(ConfigError, match="mean_ms"):
            table.taking(mean_ms)
    for points in (-0.1, np.nan, np.inf, "1", True):
        with pytest.raises(ConfigError, match="points"):
            table.costing(points)
    for both in ({}, {"mean_ms": 18.0, "points": 0.5}):
        with pytest.raises(ConfigError, match="either"):
            table.choose(**both)


def test_tables_survive_a_file_and_others_are_refused(tmp_path: Path, reseal: Callable) -> None:
    path = tmp_path / "prices.json"
    table = PriceTable.measure(PRICES, make_front(), 40.0)
    table.save(path)
    assert PriceTable.load(path) == table
    content = json.loads(path.read_text())
    for change in (
        {"points": []},
        {"points": content["points"][1:]},
        {"points": content["points"][::-1]},
        {"points": [{**content["points"][0], "price": -1.0}]},
        {"num_examples": -1},
        {"full_ms": 0.0},
        {"schema_version": 0},
        {"kind": "another"},
    ):
        reseal(path, {**content, **change})
        with pytest.raises(CheckpointError, match=r"prices\.json"):
            PriceTable.load(path)
    for prices in ((1.0,), (0.0, 0.0), ()):
        with pytest.raises(DataError, match="rising from 0"):
            PriceTable(tuple(PricePoint(p, Interval(0, 0, 0), Interval(1, 1, 1)) for p in prices), 1, 1.0)
