"""Intervals around what an evaluation measured; all at 95 % unless told otherwise.

The bootstrap resamples examples, never single records: one example's answers under several policies and budgets are
dependent, so a resample takes all of an example's records or none (cluster bootstrap; Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapters 8 and 13). Every mean of the report is linear in the per-example
values, so one set of resampled means serves them all, and paired differences come for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.errors import DataError

FloatArray = NDArray[np.float64]
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
# Resampling counts are made in blocks of at most this many numbers, to bound memory.
_BLOCK_SIZE = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """The three numbers, ready for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of `n` requests with its confidence interval; all NaN where `n` is 0."""

    rate: float
    low: float
    high: float
    n: int


def resampled_means(values: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> FloatArray:
    """Column means of bootstrap resamples of the rows, `(resamples, columns)`.

    Args:
        values: one row per example, `(examples, columns)`, without NaN.
        num_resamples: how many resamples.
        seed: the same seed and number of examples give the same resamples.

    Raises:
        DataError: there are no examples, or a value is not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] == 0 or not np.isfinite(table).all():
        raise DataError(
            f"a bootstrap needs finite values of shape (examples, columns) with at least one example, got {table.shape}"
        )
    if num_resamples < 1:
        raise DataError(f"num_resamples is {num_resamples}; it must be at least 1")
    num_examples = len(table)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_SIZE // num_examples)
    means = np.empty((num_resamples, table.shape[1]))
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = generator.integers(0, num_examples, size=(rows, num_examples))
        drawn += num_examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_examples).reshape(rows, num_examples)
        means[start : start + rows] = counts @ table / num_examples
    return means


def percentile_interval(estimate: float, resamples: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """Percentile interval of an estimate from its bootstrap resamples, `(resamples,)`."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resamples, dtype=np.float64), [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def bootstrap_mean(values: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value per example, `(examples,)`, with its bootstrap interval."""
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    means = resampled_means(column, num_resamples=num_resamples, seed=seed)
    return percentile_interval(float(column.mean()), means[:, 0])


def paired_bootstrap(
    values: ArrayLike, baseline: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `values - baseline` on the same examples, with its bootstrap interval.

    Args:
        values: one value per example, `(examples,)`, or per example and budget, `(examples, budgets)`; budgets are
            averaged within the example before examples are resampled.
        baseline: the same shape, the same examples in the same order.
        num_resamples: how many resamples.
        seed: seed of the resamples.

    Raises:
        DataError: the shapes differ, or see `resampled_means`.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape or first.ndim not in (1, 2):
        raise DataError(
            f"a paired bootstrap compares the same examples, but the shapes are {first.shape} and {second.shape}"
        )
    difference = first - second
    per_example = difference if difference.ndim == 1 else difference.mean(axis=1)
    return bootstrap_mean(per_example, num_resamples=num_resamples, seed=seed)


def gap_closed(
    values: ArrayLike,
    baseline: ArrayLike,
    ceiling: ArrayLike,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Share of the way from a baseline to a ceiling that a policy went: mean gain over mean gap, with its interval.

    Args:
        values, baseline, ceiling: same shape, `(examples,)` or `(examples, budgets)`, the same examples in order.
        num_resamples: how many resamples.
        seed: seed of the resamples.

    Returns:
        None where baseline and ceiling have the same mean, so that no share is defined.

    Raises:
        DataError: the shapes differ, or see `resampled_means`.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in (values, baseline, ceiling)]
    if len({table.shape for table in tables}) != 1 or tables[0].ndim not in (1, 2):
        raise DataError(f"the three tables must have one shape, got {[table.shape for table in tables]}")
    policy, low, high = (table if table.ndim == 1 else table.mean(axis=1) for table in tables)
    columns = np.stack([policy - low, high - low], axis=1)
    return ratio_interval(columns.mean(axis=0), resampled_means(columns, num_resamples=num_resamples, seed=seed))


def ratio_interval(estimate: ArrayLike, resamples: ArrayLike) -> Interval | None:
    """Interval of a ratio of two means, `(numerator, denominator)`, from its resamples, `(resamples, 2)`.

    Resamples whose denominator is not positive define no ratio and are left out; None where the estimate's is not.
    """
    numerator, denominator = (float(value) for value in np.asarray(estimate, dtype=np.float64))
    if denominator <= 1e-12:
        return None
    rows = np.asarray(resamples, dtype=np.float64)
    rows = rows[rows[:, 1] > 1e-12]
    if len(rows) == 0:
        return None
    return percentile_interval(numerator / denominator, rows[:, 0] / rows[:, 1])


def latency_percentiles(latency_ms: Sequence[float] | FloatArray) -> dict[str, float]:
    """Mean, p50, p95 and p99 of measured latencies in milliseconds; NaN where none was measured."""
    values = np.asarray(latency_ms, dtype=np.float64)
    if values.size == 0:
        return dict.fromkeys(("mean", "p50", "p95", "p99"), math.nan)
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return {"mean": float(values.mean()), "p50": p50, "p95": p95, "p99": p99}


def proportion_interval(
    num_events: int, n: int, *, method: Literal["exact", "wilson"] = "exact", confidence: float = CONFIDENCE
) -> Proportion:
    """Share of events with a binomial interval: Clopper-Pearson (`exact`, never too narrow) or Wilson.

    Raises:
        DataError: `num_events` does not lie in 0..n.
    """
    if not 0 <= num_events <= n:
        raise DataError(f"{num_events} events out of {n} is no proportion")
    if n == 0:
        return Proportion(math.nan, math.nan, math.nan, 0)
    from scipy.stats import binomtest

    interval = binomtest(num_events, n).proportion_ci(confidence_level=confidence, method=method)
    return Proportion(num_events / n, float(interval.low), float(interval.high), n)


def violation_proportion(
    latency_ms: ArrayLike, budget_ms: ArrayLike, feasible: ArrayLike, *, method: Literal["exact", "wilson"] = "exact"
) -> Proportion:
    """Share of timed, feasible requests whose measured latency exceeds their budget.

    Args:
        latency_ms: measured latency per request, NaN where it was not timed, `(requests,)`.
        budget_ms: budget per request, `(requests,)`.
        feasible: whether the guardrail admitted anything, `(requests,)`; where it did not, the request is not a
            violation of the policy's and is left out (it counts in the infeasible rate).
        method: the binomial interval.
    """
    latency = np.asarray(latency_ms, dtype=np.float64)
    counted = np.asarray(feasible, dtype=np.bool_) & ~np.isnan(latency)
    late = latency[counted] > np.asarray(budget_ms, dtype=np.float64)[counted]
    return proportion_interval(int(late.sum()), int(counted.sum()), method=method)
