import math

import numpy as np
import pytest

from pacevlm.errors import DataError
from pacevlm.evaluation.statistics import (
    bootstrap_mean,
    gap_closed,
    latency_percentiles,
    paired_bootstrap,
    proportion_interval,
    resampled_means,
    violation_proportion,
)


def test_resampled_means_have_the_moments_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 1))
    means = resampled_means(values, num_resamples=4000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.05)


def test_blocks_of_resamples_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    whole = resampled_means(values, num_resamples=101, seed=4)
    monkeypatch.setattr("pacevlm.evaluation.statistics._BLOCK_SIZE", 700)
    # Up to rounding: a matrix product adds up in an order that depends on its shape and on the processor.
    np.testing.assert_allclose(resampled_means(values, num_resamples=101, seed=4), whole, rtol=0, atol=1e-14)
    assert not np.array_equal(resampled_means(values, num_resamples=101, seed=5), whole)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        interval = bootstrap_mean(generator.uniform(size=120) < 0.4, num_resamples=400, seed=trial)
        covered += interval.low <= 0.4 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_paired_differences_cover_and_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(2)
    covered, widths, unpaired = 0, [], []
    for trial in range(300):
        difficulty = generator.normal(size=(100, 1))
        policy, baseline = (difficulty + mean + 0.3 * generator.normal(size=(100, 4)) for mean in (0.2, 0.0))
        interval = paired_bootstrap(policy, baseline, num_resamples=400, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
        widths.append(interval.high - interval.low)
        alone = bootstrap_mean(policy.mean(axis=1), num_resamples=400, seed=trial)
        unpaired.append(alone.high - alone.low)
    assert 0.90 <= covered / 300 <= 0.98
    assert np.mean(widths) < 0.5 * np.mean(unpaired)


def test_budgets_of_one_example_are_not_counted_as_independent() -> None:
    values = np.random.default_rng(3).uniform(size=(200, 1)).repeat(5, axis=1)
    baseline = np.zeros_like(values)
    repeated = paired_bootstrap(values, baseline, num_resamples=2000)
    single = paired_bootstrap(values[:, 0], baseline[:, 0], num_resamples=2000)
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))


def test_a_policy_against_itself_differs_by_nothing() -> None:
    values = np.random.default_rng(3).uniform(size=50)
    interval = paired_bootstrap(values, values)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_gap_closed_is_zero_at_the_baseline_and_one_at_the_ceiling() -> None:
    generator = np.random.default_rng(4)
    baseline = (generator.uniform(size=(80, 3)) < 0.5).astype(float)
    ceiling = np.maximum(baseline, generator.uniform(size=(80, 3)) < 0.3)
    for values, share in ((baseline, 0.0), (ceiling, 1.0), ((baseline + ceiling) / 2, 0.5)):
        interval = gap_closed(values, baseline, ceiling, num_resamples=500)
        assert interval is not None
        assert (interval.mean, interval.low, interval.high) == pytest.approx((share,) * 3)
    other = gap_closed(generator.permutation(ceiling), baseline, ceiling, num_resamples=500)
    assert other is not None
    assert other.low < other.mean < other.high
    assert gap_closed(ceiling, baseline, baseline) is None


def test_latency_percentiles() -> None:
    latency = latency_percentiles(list(range(1, 102)))
    assert latency == {"mean": 51.0, "p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert all(math.isnan(value) for value in latency_percentiles([]).values())


def test_proportion_intervals_match_their_formulas() -> None:
    # With no event the exact upper end solves (1 - p)^n = 0.025.
    none = proportion_interval(0, 50)
    assert (none.rate, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 50))
    z, n, p = 1.959963984540054, 80, 0.1
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wilson = proportion_interval(8, 80, method="wilson")
    assert (wilson.low, wilson.high) == pytest.approx([(centre + s * half) / (1 + z * z / n) for s in (-1, 1)])
    assert proportion_interval(8, 80).low < wilson.low
    assert math.isnan(proportion_interval(0, 0).rate)


def test_violations_count_timed_feasible_requests_over_budget() -> None:
    latency_ms = [90.0, 110.0, np.nan, 110.0, 100.0]
    feasible = [True, True, True, False, True]
    violation = violation_proportion(latency_ms, [100.0] * 5, feasible)
    assert (violation.rate, violation.n) == (pytest.approx(1 / 3), 3)


def test_unusable_input_is_refused() -> None:
    for values in ([], [1.0, np.nan]):
        with pytest.raises(DataError, match="bootstrap needs"):
            bootstrap_mean(values)
    with pytest.raises(DataError, match="same examples"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="one shape"):
        gap_closed([1.0], [1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="no proportion"):
        proportion_interval(3, 2)
    with pytest.raises(DataError, match="num_resamples"):
        resampled_means([[1.0]], num_resamples=0)
