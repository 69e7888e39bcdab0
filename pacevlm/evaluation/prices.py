"""Prices of time: what each costs and saves on given examples, which one to take, and whole fronts of policies.

Nothing here is timed. Latencies are predictions at the length that the answers had, in full latencies or milliseconds;
a budget that hardly ever binds leaves the price alone to decide. Intervals resample examples, all of a policy's prices
and all policies together, so that differences are paired.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from pacevlm.artefact import MAX_MS, Count, Ms, Range, load_artefact, save_artefact, typed
from pacevlm.checks import as_float, shown
from pacevlm.errors import CheckpointError, ConfigError, DataError
from pacevlm.evaluation.statistics import FloatArray, Interval, percentile_interval, resampled_means
from pacevlm.knobs import MAX_PRICE, check_price

PRICES_KIND, PRICES_SCHEMA_VERSION = "prices", 1
DEFAULT_COST = 0.1
"""Points of accuracy that the price costs at most which is used where none is given."""
SMALL_COST = 0.5
"""Points of accuracy that are little to most."""
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


# One policy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PricePoint:
    """What a price costs and saves.

    Attributes:
        price: points of accuracy per full latency.
        cost: accuracy lost against no price, in points; negative where it rose.
        latency: mean predicted latency, in full latencies.
    """

    price: float
    cost: Interval
    latency: Interval


class _StoredInterval(TypedDict):
    mean: Annotated[float, Range(-MAX_MS, MAX_MS)]
    low: Annotated[float, Range(-MAX_MS, MAX_MS)]
    high: Annotated[float, Range(-MAX_MS, MAX_MS)]


class _StoredPoint(TypedDict):
    price: Annotated[float, Range(0.0, MAX_PRICE)]
    cost: _StoredInterval
    latency: _StoredInterval


class _Stored(TypedDict):
    points: tuple[_StoredPoint, ...]
    num_examples: Count
    full_ms: Ms


@dataclass(frozen=True)
class PriceTable:
    """What prices cost and save with one controller, on examples that it was not trained on.

    Attributes:
        points: one for each price, from none up.
        num_examples: examples that they were measured on.
        full_ms: the full latency, milliseconds on the machine as profiled.

    Raises:
        DataError: the prices do not rise from 0.
    """

    points: tuple[PricePoint, ...]
    num_examples: int
    full_ms: float

    def __post_init__(self) -> None:
        prices = [check_price(point.price) for point in self.points]
        if prices[:1] != [0.0] or prices != sorted(set(prices)):
            raise DataError(f"a table of prices has them strictly rising from 0, not {shown(prices)}")

    @classmethod
    def measure(cls, prices: Sequence[float], front: Front, full_ms: float, *, seed: int = 0) -> Self:
        """From what a policy's choices gave on the same examples.

        Args:
            prices: strictly rising from 0, `(prices,)`.
            front: what they gave.
            full_ms: the full latency, milliseconds.
            seed: of the resamples.

        Raises:
            DataError: there are no examples, or the prices do not rise from 0.
        """
        values = np.concatenate([100 * (front.accuracy[:1] - front.accuracy), front.latency_ms / full_ms]).T
        means, resamples = values.mean(axis=0), resampled_means(values, seed=seed)
        intervals = [percentile_interval(float(mean), column) for mean, column in zip(means, resamples.T, strict=True)]
        points = zip(prices, intervals[: len(prices)], intervals[len(prices) :], strict=True)
        return cls(tuple(PricePoint(*point) for point in points), front.accuracy.shape[1], full_ms)

    def costing(self, points: float) -> PricePoint:
        """The highest price that costs at most so many points of accuracy, and no lower one costs more.

        A price costs what lower ones cost at least; where it seems to cost less, that is luck.

        Raises:
            ConfigError: `points` is no finite number from 0.
        """
        most = as_float(points)
        if most is None or most < 0:
            raise ConfigError(f"points is {shown(points)}; it must be a number of points of accuracy from 0")
        costs = np.maximum.accumulate([point.cost.mean for point in self.points])
        return self.points[int((costs <= most).sum()) - 1]

    def taking(self, mean_ms: float) -> PricePoint:
        """The lowest price at which requests take at most so many milliseconds on average, on the machine as profiled.

        Raises:
            ConfigError: no price makes them so fast, or the latency is no positive, finite number.
        """
        most = as_float(mean_ms)
        if most is None or most <= 0:
            raise ConfigError(f"mean_ms is {shown(mean_ms)}; it must be a positive, finite number of milliseconds")
        for point in self.points:
            if point.latency.mean * self.full_ms <= most:
                return point
        least = min(point.latency.mean for point in self.points) * self.full_ms
        raise ConfigError(f"no price brings the mean latency down to {most:g} ms; the least is {least:.3g} ms")

    def choose(self, *, mean_ms: float | None = None, points: float | None = None) -> PricePoint:
        """The price for one of the two: `taking` of a mean latency, or `costing` of a loss; raises as they do."""
        if mean_ms is not None and points is None:
            return self.taking(mean_ms)
        if points is not None and mean_ms is None:
            return self.costing(points)
        raise ConfigError("give either mean_ms, what requests may take on average, or points, what that may cost")

    @property
    def default_price(self) -> float:
        """What time is worth where nobody says: the highest price that costs at most `DEFAULT_COST` points."""
        return self.costing(DEFAULT_COST).price

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; raises StorageError."""
        points = [
            {"price": point.price, "cost": point.cost.to_dict(), "latency": point.latency.to_dict()}
            for point in self.points
        ]
        content = {"points": points, "num_examples": self.num_examples, "full_ms": self.full_ms}
        save_artefact(path, PRICES_KIND, PRICES_SCHEMA_VERSION, content, CheckpointError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; raises CheckpointError if it is missing or damaged."""
        values = load_artefact(path, PRICES_KIND, PRICES_SCHEMA_VERSION, CheckpointError)
        stored = typed(_Stored, values, f"the {PRICES_KIND} at {os.fspath(path)}", CheckpointError)
        points = tuple(
            PricePoint(point["price"], Interval(**point["cost"]), Interval(**point["latency"]))
            for point in stored["points"]
        )
        try:
            return cls(points, stored["num_examples"], stored["full_ms"])
        except DataError as error:
            raise CheckpointError(f"{os.fspath(path)} is malformed: {error}; calibrate again") from error


# Several policies ----------------------------------------------------------------------------------------------------


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
    default_price: float = 0.0,
    measured_ms: Mapping[str, ArrayLike] | None = None,
    num_resamples: int = NUM_FRONT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy against mean latency along the prices, and mean latencies at equal accuracy, ready for `results.json`.

    Args:
        fronts: by policy, all on the same examples; ratios are those of `controller` to each other one.
        full_accuracy: of every example with the full configuration, `(examples,)`.
        prices: points of accuracy per full latency, `(prices,)`.
        budget_ms: the budget of all requests.
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
        own = reached.get("controller", np.full(len(means), np.nan))
        ratios = {name: own / taken for name, taken in reached.items() if name != "controller"}
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
    if "controller" in fronts and default_price in prices:
        place, own, own_ms = list(prices).index(default_price), accuracy["controller"], latency_ms["controller"]
        default = {
            "price": default_price,
            "change": interval(own[:, place] - own[:, 0]),
            "latency_ratio": interval(own_ms[:, place] / own_ms[:, 0]),
            "measured": {name: _compare_times(np.asarray(ms), seed) for name, ms in (measured_ms or {}).items()},
        }
    return {
        "budget_ms": budget_ms,
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
