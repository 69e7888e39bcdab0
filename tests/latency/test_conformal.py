"""The conformal quantile is the smallest score with the promised rank."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pacevlm.errors import ConfigError
from pacevlm.latency.conformal import check_alpha, conformal_quantile, conformal_rank, min_num_scores


def test_rank_is_the_smallest_that_keeps_the_promise() -> None:
    # A new value lies at or below the r-th smallest of n exchangeable ones with chance r / (n + 1).
    for percent in (1, 5, 10, 20, 25, 50, 90):
        alpha = Fraction(percent, 100)
        for num_scores in range(1, 130):
            rank = conformal_rank(num_scores, float(alpha))
            assert Fraction(rank, num_scores + 1) >= 1 - alpha
            assert Fraction(rank - 1, num_scores + 1) < 1 - alpha


@pytest.mark.parametrize(("alpha", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.99, 1), (0.3, 3)])
def test_too_few_scores_have_no_bound(alpha: float, needed: int) -> None:
    assert min_num_scores(alpha) == needed
    scores = np.arange(float(needed))
    assert conformal_quantile(scores, alpha) is not None
    assert conformal_quantile(scores[1:], alpha) is None


def test_bound_does_not_depend_on_order() -> None:
    scores = np.random.default_rng(0).standard_normal(50)
    assert conformal_quantile(scores, 0.1) == np.sort(scores)[45]  # ceil(51 * 0.9) = 46th smallest


@pytest.mark.parametrize("alpha", [0, 1, -0.1, float("nan"), "0.1", True, None])
def test_alpha_outside_the_open_interval(alpha: object) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        check_alpha(alpha)  # type: ignore[arg-type]
