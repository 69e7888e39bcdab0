"""The lookup table: the best fixed knobs for each budget, chosen on training data; the baseline to beat."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, TypedDict

import numpy as np

from pacevlm.artefact import Ms
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.ranking import BoolArray, FloatArray, IntArray, check_table, promote_better, rank_by_mean
from pacevlm.baselines.stored import check_order, load_fitted, save_fitted
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError, KnobError
from pacevlm.knobs import Knobs, KnobSpace

KIND = "lookup table"


class _Row(TypedDict):
    budget_ms: Ms
    order: tuple[Knobs, ...]


class _Stored(TypedDict):
    budgets: tuple[_Row, ...]


class LookupTable(OneChoicePolicy):
    """For each fitted budget an order over configurations; a request runs the first that the guardrail admits.

    A budget between two fitted ones uses the lower, whose knobs were chosen for having less time; one below them all
    uses the lowest.

    Args:
        space: the knob space.
        orders: for each fitted budget in milliseconds a permutation of the space's flat indices, best first.

    Raises:
        DataError: no budget is given, or an order is not a permutation of the knob space.
    """

    name = "lookup_table"

    def __init__(self, space: KnobSpace, orders: Mapping[float, Sequence[int] | IntArray]) -> None:
        super().__init__(space)
        if not orders:
            raise DataError("a lookup table needs the order of at least one budget")
        self.budgets_ms = tuple(sorted(float(budget_ms) for budget_ms in orders))
        by_budget = {float(budget_ms): order for budget_ms, order in orders.items()}
        self.orders = tuple(check_order(by_budget[budget_ms], space) for budget_ms in self.budgets_ms)

    @classmethod
    def fit(
        cls,
        space: KnobSpace,
        budgets_ms: Sequence[float],
        accuracy: FloatArray,
        feasible: BoolArray,
        *,
        num_errors: float | None = 2.0,
    ) -> Self:
        """Choose the order of each budget on training data, under the same guardrail that applies at test time.

        Every budget starts from the ranking by mean accuracy over all training examples, admitted or not. Ranking a
        configuration only on the examples that admit it would compare different examples, since expensive ones are
        admitted mostly for small inputs. `promote_better` then moves to the front what demonstrably serves this
        budget's requests better; that alone makes the orders of two budgets differ.

        Args:
            space: the knob space.
            budgets_ms: strictly increasing, `(budgets,)`.
            accuracy: `(examples, configurations)`; NaN where not run, filled as `fill_missing` says. A table without
                NaN gives the strongest baseline.
            feasible: bool `(budgets, examples, configurations)`.
            num_errors: standard errors that a promotion must gain. 0 is best on the training examples, never below
                `FixedPolicy` there, but follows noise where they are few; None keeps the ranking by mean.

        Raises:
            DataError: see `check_table`.
        """
        budgets = np.asarray(budgets_ms, dtype=np.float64)
        accuracy, feasible = check_table(space, budgets, accuracy, feasible)
        ranking = rank_by_mean(accuracy)
        orders = {
            float(budget_ms): ranking if num_errors is None else promote_better(accuracy, mask, ranking, num_errors)
            for budget_ms, mask in zip(budgets, feasible, strict=True)
        }
        return cls(space, orders)

    def order_for(self, budget_ms: float) -> IntArray:
        """The preference order used at a budget, flat indices `(configurations,)`."""
        return self.orders[max(bisect.bisect_right(self.budgets_ms, budget_ms) - 1, 0)]

    def choose(self, request: PolicyInput) -> Knobs:
        """The first configuration of the budget's order that the guardrail admits."""
        return self.first_feasible(request, self.order_for(request.budget_ms))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; raises StorageError."""
        rows = [
            {"budget_ms": budget_ms, "order": [str(self.space[int(i)]) for i in order]}
            for budget_ms, order in zip(self.budgets_ms, self.orders, strict=True)
        ]
        save_fitted(path, KIND, self.space, {"budgets": rows})

    @classmethod
    def load(cls, path: str | Path, space: KnobSpace) -> Self:
        """Read a saved table; raises CheckpointError if malformed, IdentityError if made for another knob space."""
        rows = load_fitted(path, KIND, space, _Stored)["budgets"]
        try:
            return cls(space, {row["budget_ms"]: [space.index(knobs) for knobs in row["order"]] for row in rows})
        except (DataError, KnobError) as error:
            raise CheckpointError(f"{path} is malformed: {error}; fit the policy again") from error
