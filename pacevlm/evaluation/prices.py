"""Prices of time: what each costs and saves with the policy that answers, and which one to take.

Latencies are predictions in full latencies, as those of the front that a table is measured from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self, TypedDict

import numpy as np

from pacevlm.artefact import MAX_MS, Count, Ms, Range, load_artefact, save_artefact, typed
from pacevlm.checks import as_float, shown
from pacevlm.errors import CheckpointError, ConfigError, DataError
from pacevlm.evaluation.fronts import Front
from pacevlm.evaluation.statistics import Interval, percentile_interval, resampled_means
from pacevlm.knobs import MAX_PRICE, check_price

PRICES_KIND, PRICES_SCHEMA_VERSION = "prices", 1
DEFAULT_COST = 0.1
"""Points of accuracy that the price costs at most which is used where none is given."""


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
    """What prices cost and save with one policy, on examples that it was not trained on.

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
