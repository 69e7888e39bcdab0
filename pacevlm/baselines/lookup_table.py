"""The lookup table: the best knobs for each budget, price and size of picture, from training data; the one to beat."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from pacevlm.artefact import Count, Ms, Range
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.ranking import (
    BoolArray,
    FloatArray,
    IntArray,
    check_table,
    order_by_worth,
    promote_better,
    rank_by_mean,
)
from pacevlm.baselines.stored import check_order, load_fitted, save_fitted
from pacevlm.checks import shown
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError, KnobError
from pacevlm.knobs import MAX_PRICE, Knobs, KnobSpace, check_price

KIND = "lookup table"
# Thirds of the training pictures by size. A third of fewer examples shares the ranking of all sizes.
NUM_SIZES, MIN_EXAMPLES = 3, 50


class _Stored(TypedDict):
    """What the file holds: every distinct order once, and for each budget, price and size the place of its own."""

    budgets_ms: tuple[Ms, ...]
    prices: tuple[Annotated[float, Range(0.0, MAX_PRICE)], ...]
    max_pixels: tuple[Count, ...]
    orders: tuple[tuple[Knobs, ...], ...]
    places: tuple[tuple[tuple[Count, ...], ...], ...]


class LookupTable(OneChoicePolicy):
    """An order over configurations for each budget, price and size of picture; the first that is admitted runs.

    A budget between two fitted ones uses the lower, whose knobs were chosen for having less time; one below them all
    uses the lowest. A price uses the highest fitted one that is not above it, which gives up no more accuracy than was
    asked for.

    Args:
        space: the knob space.
        budgets_ms: fitted budgets in milliseconds, strictly increasing, `(budgets,)`.
        orders: permutations of the space's flat indices, best first, `(budgets, prices, sizes, configurations)`.
        prices: fitted prices, strictly increasing from 0, `(prices,)`.
        max_pixels: most pixels of a picture of each size but the last, `(sizes - 1,)`.

    Raises:
        DataError: budgets, prices or sizes are not in order, or the orders are not one permutation for each.
    """

    name = "lookup_table"

    def __init__(
        self,
        space: KnobSpace,
        budgets_ms: Sequence[float],
        orders: ArrayLike,
        *,
        prices: Sequence[float] = (0.0,),
        max_pixels: Sequence[int] = (),
    ) -> None:
        super().__init__(space)
        self.budgets_ms = tuple(float(budget_ms) for budget_ms in budgets_ms)
        self.prices = tuple(check_price(price) for price in prices)
        self.max_pixels = tuple(int(pixels) for pixels in max_pixels)
        if not self.budgets_ms or list(self.budgets_ms) != sorted(set(self.budgets_ms)):
            raise DataError(f"a lookup table needs strictly increasing budgets, not {shown(self.budgets_ms)}")
        if self.prices[:1] != (0.0,) or list(self.prices) != sorted(set(self.prices)):
            raise DataError(f"a lookup table needs strictly increasing prices from 0, not {shown(self.prices)}")
        if list(self.max_pixels) != sorted(self.max_pixels):
            raise DataError(f"a lookup table needs increasing sizes, not {shown(self.max_pixels)}")
        shape = (len(self.budgets_ms), len(self.prices), len(self.max_pixels) + 1)
        self.orders: IntArray = np.asarray(orders, dtype=np.int64)
        if self.orders.shape != (*shape, len(space)):
            raise DataError(
                f"the orders have shape {self.orders.shape}; {shape[0]} budgets, {shape[1]} prices, {shape[2]} sizes "
                f"and {len(space)} configurations need {(*shape, len(space))}"
            )
        for order in np.unique(self.orders.reshape(-1, len(space)), axis=0):
            check_order(order, space)

    @classmethod
    def fit(
        cls,
        space: KnobSpace,
        budgets_ms: Sequence[float],
        accuracy: FloatArray,
        feasible: BoolArray,
        *,
        num_errors: float | None = 2.0,
        prices: Sequence[float] = (0.0,),
        latency: FloatArray | None = None,
        num_pixels: ArrayLike | None = None,
    ) -> Self:
        """Choose all orders on training data, under the same guardrail that applies at test time.

        Every budget starts from the ranking by mean accuracy over all training examples of a size, admitted or not.
        Ranking a configuration only on the examples that admit it would compare different examples, since expensive
        ones are admitted mostly for small inputs. `promote_better` then moves to the front what demonstrably serves
        this budget's requests better; that alone makes the orders of two budgets differ. `order_by_worth` makes an
        order for each price of it.

        Args:
            space: the knob space.
            budgets_ms: strictly increasing, `(budgets,)`.
            accuracy: `(examples, configurations)`; NaN where not run, filled as `fill_missing` says. A table without
                NaN gives the strongest baseline.
            feasible: bool `(budgets, examples, configurations)`.
            num_errors: standard errors that a promotion must gain. 0 is best on the training examples, never below
                `FixedPolicy` there, but follows noise where they are few; None keeps the ranking by mean.
            prices: strictly increasing from 0, `(prices,)`.
            latency: predicted, in full latencies, `(examples, configurations)`; only a price above 0 needs it.
            num_pixels: of the pictures, `(examples,)`; None makes one ranking for all sizes.

        Raises:
            DataError: see `check_table`; or latencies or sizes are missing or of another shape.
        """
        budgets = np.asarray(budgets_ms, dtype=np.float64)
        accuracy, feasible = check_table(space, budgets, accuracy, feasible)
        if latency is None and tuple(prices) != (0.0,):
            raise DataError("prices need the predicted latency of every example and configuration")
        latency = np.zeros_like(accuracy) if latency is None else np.asarray(latency, dtype=np.float64)
        pixels = np.zeros(len(accuracy), np.int64) if num_pixels is None else np.asarray(num_pixels, dtype=np.int64)
        if latency.shape != accuracy.shape or pixels.shape != accuracy.shape[:1]:
            raise DataError(
                f"latency has shape {latency.shape} and num_pixels {pixels.shape}, but the accuracies {accuracy.shape}"
            )
        max_pixels: list[int] = []
        if num_pixels is not None:
            shares = np.arange(1, NUM_SIZES) / NUM_SIZES
            max_pixels = np.quantile(pixels, shares, method="lower").tolist()
        sizes = _size_of(pixels, max_pixels)
        orders = np.empty((len(budgets), len(prices), len(max_pixels) + 1, len(space)), dtype=np.int64)
        for size in range(len(max_pixels) + 1):
            rows = np.flatnonzero(sizes == size)
            rows = rows if len(rows) >= MIN_EXAMPLES or not max_pixels else np.arange(len(pixels))
            scores, mean_latency = accuracy[rows], latency[rows].mean(axis=0)
            ranking = rank_by_mean(scores)
            for b, mask in enumerate(feasible[:, rows]):
                order = ranking if num_errors is None else promote_better(scores, mask, ranking, num_errors)
                orders[b, :, size] = order_by_worth(order, scores.mean(axis=0), mean_latency, prices)
        return cls(space, budgets.tolist(), orders, prices=prices, max_pixels=max_pixels)

    def order_for(self, budget_ms: float, price: float = 0.0, num_pixels: int = 0) -> IntArray:
        """The preference order used for a budget, a price and a picture, flat indices `(configurations,)`."""
        budget = max(bisect.bisect_right(self.budgets_ms, budget_ms) - 1, 0)
        place = bisect.bisect_right(self.prices, price) - 1
        return np.asarray(self.orders[budget, place, self.size_of(num_pixels)])

    def size_of(self, num_pixels: ArrayLike) -> IntArray:
        """The place of pictures' sizes among those that have rankings of their own, `(...)`."""
        return _size_of(num_pixels, self.max_pixels)

    def choose(self, request: PolicyInput) -> Knobs:
        """The first configuration of the request's order that the guardrail admits."""
        objective = request.objective
        order = self.order_for(objective.budget_ms, objective.price, request.view.sizes.num_pixels)
        return self.first_feasible(request, order)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; raises StorageError."""
        distinct, places = np.unique(self.orders.reshape(-1, len(self.space)), axis=0, return_inverse=True)
        content = {
            "budgets_ms": self.budgets_ms,
            "prices": self.prices,
            "max_pixels": self.max_pixels,
            "orders": [[str(self.space[int(i)]) for i in order] for order in distinct],
            "places": places.reshape(self.orders.shape[:3]).tolist(),
        }
        save_fitted(path, KIND, self.space, content)

    @classmethod
    def load(cls, path: str | Path, space: KnobSpace) -> Self:
        """Read a saved table; raises CheckpointError if malformed, IdentityError if made for another knob space."""
        content = load_fitted(path, KIND, space, _Stored)
        try:
            distinct = [check_order([space.index(knobs) for knobs in order], space) for order in content["orders"]]
            orders = np.array(distinct)[np.array(content["places"], dtype=np.int64)]
            return cls(space, content["budgets_ms"], orders, prices=content["prices"], max_pixels=content["max_pixels"])
        except (DataError, IndexError, KnobError, ValueError) as error:  # a place that is missing, or names no order
            raise CheckpointError(f"{path} is malformed: {error}; fit the policy again") from error


def _size_of(num_pixels: ArrayLike, max_pixels: Sequence[int]) -> IntArray:
    return np.asarray(np.searchsorted(max_pixels, num_pixels, side="left"))
