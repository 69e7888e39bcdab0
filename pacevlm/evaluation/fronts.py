"""Fronts of accuracy against mean latency, along the prices of time, and policies compared by them.

Nothing here is timed. Latencies are predictions at the length that the answers had; a budget that hardly ever binds
leaves the price alone to decide. Intervals resample examples, all of a policy's prices and all policies together, so
that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pacevlm.evaluation.statistics import FloatArray, percentile_interval, resampled_means

POINTS_BELOW = (2, 4, 6)
"""Points of accuracy below the full configuration at which mean latencies are compared."""
NUM_FRONT_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Front:
    """What one policy's choices gave at every price, on the same examples.

    Attributes:
        accuracy: from 0 to 1, `(prices, examples)`.
        latency_ms: predicted, `(prices, examples)`.
    """

    accuracy: FloatArray
    latency_ms: FloatArray


def latency_at(accuracy: ArrayLike, latency_ms: ArrayLike, target: ArrayLike) -> FloatArray:
    """The lowest mean latency at which a front reaches a mean accuracy, `(...)`; NaN where it does not.

    A policy that draws one of two others at random lies between them, so points between two of a front count as well.

    Args:
        accuracy, latency_ms: means of the front's points, `(..., points)`.
        target: `(...)`.
    """
    accuracy, latency_ms = np.asarray(accuracy, dtype=np.float64), np.asarray(latency_ms, dtype=np.float64)
    over = accuracy - np.asarray(target, dtype=np.float64)[..., None]
    reached = over >= -1e-12
    best = np.where(reached, latency_ms, np.inf).min(axis=-1)
    # Every pair of a point that reaches the target and one that does not, mixed so that the mean just does.
    pairs = reached[..., :, None] & ~reached[..., None, :]
    gap = np.where(pairs, over[..., :, None] - over[..., None, :], 1.0)
    step = (latency_ms[..., None, :] - latency_ms[..., :, None]) * over[..., :, None] / gap
    mixed = np.where(pairs, latency_ms[..., :, None] + step, np.inf).min(axis=(-2, -1))
    found = np.minimum(best, mixed)
    return np.asarray(np.where(np.isfinite(found), found, np.nan))


def summarise_fronts(
    fronts: Mapping[str, Front],
    full_accuracy: ArrayLike,
    prices: Sequence[float],
    *,
    budget_ms: float,
    own: str = "controller",
    default_price: float = 0.0,
    measured_ms: Mapping[str, ArrayLike] | None = None,
    num_resamples: int = NUM_FRONT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy against mean latency along the prices, and mean latencies at equal accuracy, ready for `results.json`.

    Args:
        fronts: by policy, all on the same examples.
        full_accuracy: of every example with the full configuration, `(examples,)`.
        prices: points of accuracy per full latency, `(prices,)`.
        budget_ms: the budget of all requests.
        own: the policy whose ratios to each other one are wanted, and whose default price it is.
        default_price: one of the prices; what is used where none is given.
        measured_ms: by policy, of examples timed alone without a price and at the default one, `(2, examples)`.
        num_resamples, seed: bootstrap resamples of the examples, shared by all intervals.
    """
    columns = [np.asarray(full_accuracy, dtype=np.float64)[None]]
    columns += [table for front in fronts.values() for table in (front.accuracy, front.latency_ms)]
    values = np.concatenate(columns).T
    resamples = resampled_means(values, num_resamples=num_resamples, seed=seed)
    # The estimates themselves in front of their resamples.
    means = np.concatenate([values.mean(axis=0)[None], resamples])
    tables = np.split(means[:, 1:], 2 * len(fronts), axis=1)
    accuracy, latency_ms = dict(zip(fronts, tables[::2], strict=True)), dict(zip(fronts, tables[1::2], strict=True))

    def interval(column: FloatArray) -> dict[str, float]:
        return percentile_interval(float(column[0]), column[1:]).to_dict()

    def compare(points: int) -> dict[str, Any]:
        target = means[:, 0] - points / 100
        reached = {name: latency_at(accuracy[name], latency_ms[name], target) for name in fronts}
        own_ms = reached.get(own, np.full(len(means), np.nan))
        ratios = {name: own_ms / taken for name, taken in reached.items() if name != own}
        return {
            "points_below": points,
            "mean_ms": {name: None if np.isnan(taken[0]) else float(taken[0]) for name, taken in reached.items()},
            # Resamples in which one of the two does not reach the accuracy say nothing.
            "ratio": {
                name: None if np.isnan(ratio[0]) else interval(ratio[~np.isnan(ratio)])
                for name, ratio in ratios.items()
                if len(ratio) > 1
            },
        }

    default = None
    if own in fronts and default_price in prices:
        place, own_accuracy, own_ms = list(prices).index(default_price), accuracy[own], latency_ms[own]
        default = {
            "price": default_price,
            "change": interval(own_accuracy[:, place] - own_accuracy[:, 0]),
            "latency_ratio": interval(own_ms[:, place] / own_ms[:, 0]),
            "measured": {name: _compare_times(np.asarray(ms), seed) for name, ms in (measured_ms or {}).items()},
        }
    return {
        "budget_ms": budget_ms,
        "own": own,
        "prices": list(prices),
        "policies": {
            name: [
                {"accuracy": interval(accuracy[name][:, i]), "latency_ms": interval(latency_ms[name][:, i])}
                for i in range(len(prices))
            ]
            for name in fronts
        },
        "equal_accuracy": [compare(points) for points in POINTS_BELOW],
        "default": default,
    }


def _compare_times(measured_ms: FloatArray, seed: int) -> dict[str, Any]:
    """Mean times without a price and at one, `(2, examples)`, and their ratio."""
    means = measured_ms.mean(axis=1)
    resamples = resampled_means(measured_ms.T, num_resamples=NUM_FRONT_RESAMPLES, seed=seed)
    ratio = percentile_interval(float(means[1] / means[0]), resamples[:, 1] / resamples[:, 0])
    return {"free_ms": float(means[0]), "priced_ms": float(means[1]), "ratio": ratio.to_dict(), "n": len(measured_ms.T)}
