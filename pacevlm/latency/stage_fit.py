"""The robust non-negative fit of one stage's time to its physical terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pacevlm.artefact import MAX_MS, Count, Duration, Range, check_keys, typed
from pacevlm.errors import ProfileError

# Times below a microsecond are noise of the timer: the relative error is taken of at least this much.
MIN_MS = 1e-3
# A row is a gross outlier if its log residual lies this many robust standard deviations from the median residual,
# and at least 10 % off: without the second condition a nearly exact fit would drop its own rounding.
OUTLIER_SIGMAS = 3.0
MIN_OUTLIER_LOG = float(np.log(1.1))
MAD_TO_SIGMA = 1.4826
# The median of so many repeats is robust by itself; such rows are never dropped.
ROBUST_REPEATS = 3

Array = NDArray[np.float64]
# An error relative to at least `MIN_MS` of at most `MAX_MS`.
Ratio = Annotated[float, Range(0.0, MAX_MS / MIN_MS)]


@dataclass(frozen=True, slots=True)
class StageFit:
    """One stage's fitted coefficients and how well they fit.

    Attributes:
        coefficients: milliseconds per unit of each term, all non-negative.
        num_rows: distinct term values that were measured.
        num_dropped: rows of them that were dropped as gross outliers.
        ape_p50: median absolute relative error over the rows, dropped ones included.
        ape_p95: 95th percentile of the same.
    """

    coefficients: tuple[Duration, ...]
    num_rows: Count
    num_dropped: Count
    ape_p50: Ratio
    ape_p95: Ratio

    def to_dict(self, terms: Sequence[str]) -> dict[str, Any]:
        """All values, ready for JSON, the coefficients named by their terms."""
        return {
            "coefficients": dict(zip(terms, self.coefficients, strict=True)),
            "num_rows": self.num_rows,
            "num_dropped": self.num_dropped,
            "ape_p50": self.ape_p50,
            "ape_p95": self.ape_p95,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], terms: Sequence[str]) -> StageFit:
        """Inverse of `to_dict`; raises ProfileError if values are unknown, missing or no numbers."""
        check_keys("a stage", values, {"coefficients", "num_rows", "num_dropped", "ape_p50", "ape_p95"})
        check_keys("a stage's coefficients", values["coefficients"], set(terms))
        coefficients = [values["coefficients"][term] for term in terms]
        fit: StageFit = typed(cls, {**values, "coefficients": coefficients}, "a stage")
        return fit


def check_coefficients(stage: str, fit: StageFit, terms: Sequence[str]) -> None:
    """Raise ProfileError unless there is one finite, non-negative coefficient for every term."""
    coefficients = np.asarray(fit.coefficients)
    if len(coefficients) != len(terms) or not np.isfinite(coefficients).all() or (coefficients < 0).any():
        raise ProfileError(
            f"stage {stage} has the coefficients {fit.coefficients}; it needs {len(terms)} finite numbers from 0"
        )


def fit_stage(terms: Array, measured_ms: Array) -> StageFit:
    """Fit non-negative coefficients to the relative error of a stage's time.

    Measurements with the same terms are repeats: their median counts, weighted by the square root of their number.
    After a first fit, rows with fewer than 3 repeats whose log residual lies more than 3 robust standard deviations
    (1.4826 MAD), and at least 10 %, from the median residual are dropped, and the rest is fitted once more.

    Method: non-negative least squares (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23).

    Args:
        terms: shape `(samples, terms)`, non-negative.
        measured_ms: shape `(samples,)`, non-negative.

    Raises:
        ProfileError: there is nothing to fit, or the fit does not converge.
    """
    if not len(measured_ms):
        raise ProfileError("no measurements to fit")
    rows, owner, counts = np.unique(terms, axis=0, return_inverse=True, return_counts=True)
    owner = owner.ravel()
    medians_ms = np.array([np.median(measured_ms[owner == row]) for row in range(len(rows))])
    weights = np.sqrt(counts) / np.maximum(medians_ms, MIN_MS)
    coefficients = _nonnegative_least_squares(rows * weights[:, None], medians_ms * weights)

    residuals = np.log(np.maximum(medians_ms, MIN_MS) / np.maximum(rows @ coefficients, MIN_MS))
    deviations = np.abs(residuals - np.median(residuals))
    limit = max(OUTLIER_SIGMAS * MAD_TO_SIGMA * float(np.median(deviations)), MIN_OUTLIER_LOG)
    dropped = (deviations > limit) & (counts < ROBUST_REPEATS)
    if dropped.any() and not dropped.all():
        kept = ~dropped
        coefficients = _nonnegative_least_squares((rows * weights[:, None])[kept], (medians_ms * weights)[kept])
    else:
        dropped = np.zeros_like(dropped)
    errors = np.abs(rows @ coefficients - medians_ms) / np.maximum(medians_ms, MIN_MS)
    return StageFit(
        coefficients=tuple(coefficients.tolist()),
        num_rows=len(rows),
        num_dropped=int(dropped.sum()),
        ape_p50=float(np.quantile(errors, 0.5)),
        ape_p95=float(np.quantile(errors, 0.95)),
    )


def _nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    # Columns differ by many orders of magnitude (1 against tokens²): unit columns keep the solver well conditioned.
    scales = np.linalg.norm(matrix, axis=0)
    scales[scales == 0.0] = 1.0
    try:
        solution, _ = nnls(matrix / scales, target)
    except RuntimeError as error:
        raise ProfileError(f"the fit of a stage does not converge: {error}") from error
    return np.asarray(solution / scales, dtype=np.float64)
