"""The finite-sample quantile of split conformal prediction, shared by every calibrated bound."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from pacevlm.checks import as_float
from pacevlm.errors import ConfigError


def check_alpha(alpha: float) -> float:
    """Return the allowed miss rate as a float; raises ConfigError unless it lies strictly between 0 and 1."""
    number = as_float(alpha)
    if number is None or not 0.0 < number < 1.0:
        raise ConfigError(f"alpha is {alpha!r}; it must lie strictly between 0 and 1, for example 0.1")
    return number


def conformal_rank(num_scores: int, alpha: float) -> int:
    """Which smallest score bounds a new one with probability at least 1 − alpha: `ceil((n + 1)(1 − alpha))`.

    A rank above `num_scores` says that there are too few scores for this alpha.
    """
    # 1e-9 keeps a product that is a whole number but for rounding from going one rank too far.
    return max(math.ceil((num_scores + 1) * (1.0 - alpha) - 1e-9), 1)


def min_num_scores(alpha: float) -> int:
    """Fewest scores with which a bound at miss rate `alpha` exists."""
    num_scores = max(math.floor(1.0 / alpha) - 2, 1)
    while conformal_rank(num_scores, alpha) > num_scores:
        num_scores += 1
    return num_scores


def conformal_quantile(scores: ArrayLike, alpha: float) -> float | None:
    """One-sided split-conformal bound: a new exchangeable score lies at or below it with probability 1 − alpha or more.

    Method: split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005,
    section 4.1; Lei et al., "Distribution-Free Predictive Inference for Regression", 2018, section 2.2).

    Args:
        scores: shape `(n,)`.

    Returns:
        The bound, or None when there are too few scores for this alpha.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    rank = conformal_rank(values.size, alpha)
    return None if rank > values.size else float(values[rank - 1])
