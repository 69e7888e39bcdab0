"""Preference orders over configurations, fitted on a table of training accuracies.

A policy that follows an order runs, for each request, the first configuration of the order that the guardrail
admits. All arrays use the knob space's flat index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pacevlm.errors import DataError
from pacevlm.knobs import KnobSpace

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def check_table(
    space: KnobSpace, budgets_ms: FloatArray, accuracy: FloatArray, feasible: BoolArray
) -> tuple[FloatArray, BoolArray]:
    """Make the training table ready for fitting: missing accuracies filled, every request given something to run.

    Args:
        space: the knob space that the columns follow.
        budgets_ms: budgets that are fitted, strictly increasing, `(budgets,)`.
        accuracy: `(examples, configurations)`, NaN where an example did not run with a configuration.
        feasible: the guardrail's mask, bool `(budgets, examples, configurations)`; a request that admits nothing runs
            the cheapest configuration.

    Returns:
        `accuracy` without NaN and `feasible` with the cheapest configuration admitted where nothing else is.

    Raises:
        DataError: shapes disagree, budgets are not increasing, or an example or a configuration never ran.
    """
    accuracy = np.asarray(accuracy, dtype=np.float64)
    feasible = np.asarray(feasible, dtype=np.bool_)
    expected = (len(budgets_ms), accuracy.shape[0], len(space))
    if accuracy.ndim != 2 or accuracy.shape[0] == 0 or feasible.shape != expected or accuracy.shape[1] != len(space):
        raise DataError(
            f"accuracy has shape {accuracy.shape} and feasible {feasible.shape}; for {len(space)} configurations and "
            f"{len(budgets_ms)} budgets they must be (examples, configurations) and (budgets, examples, configurations)"
        )
    if len(budgets_ms) == 0 or np.any(np.diff(budgets_ms) <= 0) or not np.all(np.isfinite(budgets_ms)):
        raise DataError(f"budgets_ms {list(budgets_ms)} must be a non-empty, strictly increasing list of milliseconds")
    feasible = feasible.copy()
    feasible[~feasible.any(axis=2), space.index(space.cheapest)] = True
    return fill_missing(accuracy), feasible


def fill_missing(accuracy: FloatArray) -> FloatArray:
    """Fill the NaN of a table by least squares on the sum of one effect per example and one per configuration.

    Means over whatever happened to run would compare configurations on different examples (expensive ones run mostly
    on small, easy images); the effect of the example takes that out. A complete table comes back unchanged.

    Raises:
        DataError: an example or a configuration never ran.
    """
    seen = ~np.isnan(accuracy)
    if seen.all():
        return accuracy
    for name, axis in (("example", 1), ("configuration", 0)):
        if not seen.any(axis=axis).all():
            raise DataError(
                f"{int((~seen.any(axis=axis)).sum())} {name}s of the training table never ran; run or leave them out"
            )
    values = np.where(seen, accuracy, 0.0)
    weight = seen.astype(np.float64)
    per_example = weight.sum(axis=1, keepdims=True)
    # Normal equations with the example effects eliminated; lstsq picks the smallest solution of the singular system.
    matrix = np.diag(weight.sum(axis=0)) - weight.T @ (weight / per_example)
    right = (values - weight * (values.sum(axis=1, keepdims=True) / per_example)).sum(axis=0)
    configuration_effect = np.linalg.lstsq(matrix, right, rcond=None)[0]
    example_effect = ((values - weight * configuration_effect).sum(axis=1, keepdims=True)) / per_example
    return np.where(seen, accuracy, np.clip(example_effect + configuration_effect, 0.0, 1.0))


def rank_by_mean(accuracy: FloatArray) -> IntArray:
    """Configurations from the highest to the lowest mean over all examples, equal ones cheapest index first.

    Over all examples, not only those that a budget admits: every configuration is then judged on the same examples.
    """
    # Rounding keeps ties that summation order alone would break.
    return np.argsort(-np.round(accuracy.mean(axis=0), 12), kind="stable").astype(np.int64)


def served_accuracy(accuracy: FloatArray, feasible: BoolArray, order: IntArray) -> FloatArray:
    """Accuracy of each example, `(examples,)`, when it runs the first feasible configuration of an order."""
    chosen = order[np.argmax(feasible[:, order], axis=1)]
    return np.asarray(accuracy[np.arange(len(accuracy)), chosen])


def promote(order: IntArray, index: int) -> IntArray:
    """The order with one configuration moved to its front."""
    return np.concatenate([np.array([index], dtype=np.int64), order[order != index]])


def promote_better(accuracy: FloatArray, feasible: BoolArray, order: IntArray, num_errors: float) -> IntArray:
    """Move configurations to the front while that raises the accuracy actually served at one budget.

    A ranking by mean ignores that an expensive configuration runs only on the requests that admit it. Each step takes
    the configuration whose move to the front gains most on the training examples, among those whose gain exceeds
    `num_errors` standard errors of the paired difference; it ends when there is none. The threshold is there because
    the best of many candidates is taken, so that small gains are mostly noise. Where every request admits everything,
    nothing can be gained and the order stays.

    Args:
        accuracy: complete table `(examples, configurations)`.
        feasible: mask at this budget, `(examples, configurations)`.
        order: the order to start from, `(configurations,)`.
        num_errors: standard errors that a gain must exceed.
    """
    served = served_accuracy(accuracy, feasible, order)
    # Each accepted step raises the served mean, so the loop ends.
    while True:
        gain = np.where(feasible, accuracy - served[:, None], 0.0)
        mean = gain.mean(axis=0)
        threshold = num_errors * gain.std(axis=0) / np.sqrt(len(gain))
        mean[mean <= np.maximum(threshold, 1e-12)] = 0.0
        best = int(mean.argmax())
        if mean[best] == 0.0:
            return order
        order, served = promote(order, best), served + gain[:, best]


def order_by_worth(
    order: IntArray, accuracy: FloatArray, latency: FloatArray, prices: Sequence[float] | FloatArray
) -> IntArray:
    """An order for each price of time: by mean accuracy less what the mean latency costs, `(prices, configurations)`.

    At no price it is the given order: a configuration that was promoted counts as accurate as what it was put before.
    So a higher price only ever moves configurations of a lower mean latency before ones of a higher, and the first that
    a mask admits, whatever it is, gets no slower.

    Args:
        order: the order at no price, `(configurations,)`.
        accuracy: means, `(configurations,)`.
        latency: means in full latencies, `(configurations,)`.
        prices: points of accuracy per full latency, `(prices,)`.
    """
    level = np.maximum.accumulate(accuracy[order][::-1])[::-1]
    worth = level - np.outer(np.asarray(prices, dtype=np.float64) / 100, latency[order])
    return order[np.argsort(-np.round(worth, 12), axis=1, kind="stable")]
