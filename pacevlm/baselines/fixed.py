"""One configuration for all budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypedDict

import numpy as np

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.ranking import (
    BoolArray,
    FloatArray,
    IntArray,
    check_table,
    promote,
    rank_by_mean,
    served_accuracy,
)
from pacevlm.baselines.stored import check_order, load_fitted, save_fitted
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError, KnobError
from pacevlm.knobs import Knobs, KnobSpace

KIND = "fixed policy"


class _Stored(TypedDict):
    knobs: Knobs
    order: tuple[Knobs, ...]


class FixedPolicy(OneChoicePolicy):
    """Wants the same knobs for every request; where the guardrail refuses them, the next of its preference order.

    Args:
        knobs: the configuration wanted.
        space: the knob space.
        preference: flat indices `(configurations,)`, best first, to fall back on. Without one, the configuration
            fewest knob steps away from the wanted one is taken, and of equally close ones the one with more compute.

    Raises:
        KnobError: the knobs are not in the space.
        DataError: the preference is not a permutation of the space.
    """

    name = "fixed"

    def __init__(self, knobs: Knobs, space: KnobSpace, preference: Sequence[int] | IntArray | None = None) -> None:
        super().__init__(space)
        self.knobs = knobs
        wanted = space.index(knobs)
        order = _by_distance(wanted, space) if preference is None else check_order(preference, space)
        self.order = promote(order, wanted)

    @classmethod
    def fit(cls, space: KnobSpace, budgets_ms: Sequence[float], accuracy: FloatArray, feasible: BoolArray) -> Self:
        """The configuration with the best training accuracy averaged over budgets, fallbacks counted.

        Every configuration is tried as the wanted one, with the ranking by mean training accuracy behind it.

        Args:
            space: the knob space.
            budgets_ms: strictly increasing, `(budgets,)`.
            accuracy: `(examples, configurations)`, NaN where not run.
            feasible: bool `(budgets, examples, configurations)`.

        Raises:
            DataError: see `check_table`.
        """
        accuracy, feasible = check_table(space, np.asarray(budgets_ms, dtype=np.float64), accuracy, feasible)
        ranking = rank_by_mean(accuracy)
        value = np.mean(
            [
                np.where(mask, accuracy, served_accuracy(accuracy, mask, ranking)[:, None]).mean(axis=0)
                for mask in feasible
            ],
            axis=0,
        )
        # The ranking's own order decides ties, so the fallback and the choice agree.
        best = ranking[int(np.argmax(np.round(value[ranking], 12)))]
        return cls(space[int(best)], space, ranking)

    def choose(self, request: PolicyInput) -> Knobs:
        """The wanted knobs if admitted, else the first of the preference order that is."""
        return self.first_feasible(request, self.order)

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON; raises StorageError."""
        content = {"knobs": str(self.knobs), "order": [str(self.space[int(i)]) for i in self.order]}
        save_fitted(path, KIND, self.space, content)

    @classmethod
    def load(cls, path: str | Path, space: KnobSpace) -> Self:
        """Read a saved policy; raises CheckpointError if malformed, IdentityError if made for another knob space."""
        content = load_fitted(path, KIND, space, _Stored)
        try:
            return cls(content["knobs"], space, [space.index(knobs) for knobs in content["order"]])
        except (DataError, KnobError) as error:
            raise CheckpointError(f"{path} is malformed: {error}; fit the policy again") from error


def _by_distance(wanted: int, space: KnobSpace) -> IntArray:
    """Flat indices by the number of single knob steps from `wanted`, of equal ones the highest index first."""
    steps = np.stack(np.unravel_index(np.arange(len(space)), space.shape))
    distance = np.abs(steps - steps[:, [wanted]]).sum(axis=0)
    return np.lexsort((-np.arange(len(space)), distance)).astype(np.int64)
