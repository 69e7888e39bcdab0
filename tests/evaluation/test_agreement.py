"""Agreement of orders: scipy's correlation, and intervals that tell a group that differs from a small one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from pacevlm.evaluation.agreement import compare_orders, rank_correlations


def test_correlations_are_scipys_ties_included() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (20, 9)) / 7, rng.normal(size=(20, 9))
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlations(a, b), expected)
    assert np.isnan(rank_correlations([[0.1] * 4], [[1, 2, 3, 4]])).all()


def make_losses(alike: bool, num_examples: int = 600) -> tuple[dict[int, np.ndarray], list[str]]:
    """Losses of two groups for eight blocks; those of `b` are the other way round unless they are alike."""
    rng = np.random.default_rng(1)
    groups = ["a", "a", "b"] * (num_examples // 3)
    chance = np.linspace(0.05, 0.9, 8)
    rows = np.array([chance if alike or group == "a" else chance[::-1] for group in groups])
    lost = (rng.random(rows.shape) < rows).astype(float)
    return {block + 1: lost[:, block] for block in range(8)}, groups


def test_a_group_that_needs_other_blocks_agrees_less_than_as_many_questions_of_all() -> None:
    lost, groups = make_losses(alike=False)
    a, b = compare_orders(lost, groups, num_resamples=300)
    assert (a.name, a.num_examples, b.name, b.num_examples) == ("a", 400, "b", 200)
    assert a.order == tuple(range(1, 9))
    assert b.order == tuple(range(8, 0, -1))
    for group in (a, b):
        assert group.correlation is not None
        assert group.correlation.low <= group.correlation.mean <= group.correlation.high
        assert group.drawn is not None
    assert a.correlation is not None
    assert a.correlation.mean > 0.9
    assert b.correlation is not None
    assert b.drawn is not None
    assert b.correlation.high < b.drawn.low


def test_a_group_that_is_like_the_others_agrees_as_drawn_ones_do() -> None:
    lost, groups = make_losses(alike=True)
    for group in compare_orders(lost, groups, num_resamples=300):
        assert group.correlation is not None
        assert group.drawn is not None
        assert group.drawn.low <= group.correlation.mean


def test_the_point_is_the_correlation_of_the_means() -> None:
    lost, groups = make_losses(alike=False)
    table, inside = np.stack(list(lost.values())), np.array(groups) == "b"
    expected = spearmanr(table[:, inside].mean(axis=1), table.mean(axis=1)).statistic
    b = compare_orders(lost, groups, num_resamples=10)[1]
    assert b.correlation is not None
    assert b.correlation.mean == pytest.approx(expected)


def test_what_has_no_order_has_no_correlation() -> None:
    lost, groups = make_losses(alike=True)
    inside = np.array(groups) == "b"
    (_, b) = compare_orders({block: values * ~inside for block, values in lost.items()}, groups, num_resamples=10)
    assert b.correlation is None
    assert b.order == tuple(range(1, 9))
    assert compare_orders(lost, ["all"] * len(groups)) == ()
