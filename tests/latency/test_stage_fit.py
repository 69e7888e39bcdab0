"""A stage's fit is non-negative, minds relative errors and is not led astray by single measurements."""

from __future__ import annotations

import numpy as np
import pytest

from pacevlm.errors import ProfileError
from pacevlm.latency.stage_fit import fit_stage


def test_coefficients_are_never_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        terms = np.column_stack([np.ones(40), rng.uniform(0, 1000, 40)])
        falling_ms = np.maximum(50 - 0.04 * terms[:, 1], 0.1) * rng.uniform(0.9, 1.1, 40)
        assert min(fit_stage(terms, falling_ms).coefficients) >= 0


def test_small_and_large_times_count_alike() -> None:
    # The law is not linear: an absolute fit would miss the small times by a multiple to please the large ones.
    size = np.repeat(np.array([1.0, 10.0, 100.0, 1000.0]), 5)
    measured_ms = 2.0 * size * np.where(size < 1000, 1.0, 0.95)
    terms = np.column_stack([np.ones_like(size), size])
    fit = fit_stage(terms, measured_ms)
    assert np.abs(terms @ np.array(fit.coefficients) / measured_ms - 1).max() < 0.05


def test_the_median_of_repeats_counts() -> None:
    size = np.repeat(np.arange(1.0, 9.0), 5)
    measured_ms = 3.0 + size
    measured_ms[::5] *= 30.0  # one of every five repeats
    fit = fit_stage(np.column_stack([np.ones_like(size), size]), measured_ms)
    np.testing.assert_allclose(fit.coefficients, (3.0, 1.0), rtol=1e-9)
    assert (fit.num_rows, fit.num_dropped) == (8, 0)


def test_a_repeated_row_off_the_law_is_kept_and_a_single_one_is_not() -> None:
    size = np.arange(1.0, 21.0)
    measured_ms = 3.0 + size
    measured_ms[9] *= 2.0
    terms = np.column_stack([np.ones_like(size), size])
    fit = fit_stage(terms, measured_ms)
    assert fit.num_dropped == 1
    np.testing.assert_allclose(fit.coefficients, (3.0, 1.0), rtol=1e-9)
    repeated = fit_stage(np.concatenate([terms, terms[9:10], terms[9:10]]), np.append(measured_ms, [26.0, 26.0]))
    assert (repeated.num_rows, repeated.num_dropped) == (20, 0)


def test_a_stage_that_takes_no_time_fits_zero() -> None:
    fit = fit_stage(np.ones((4, 1)), np.zeros(4))
    assert fit.coefficients == (0.0,)
    assert fit.ape_p95 == 0.0


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ProfileError):
        fit_stage(np.ones((0, 2)), np.ones(0))
