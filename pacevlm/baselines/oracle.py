"""The best in hindsight: the ceiling of every policy under the same guardrail."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.ranking import FloatArray
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import DataError
from pacevlm.knobs import Knobs, KnobSpace


class OraclePolicy(OneChoicePolicy):
    """The feasible configuration that is worth most on the example itself, of equal ones the fastest predicted.

    What it is worth is its accuracy less its predicted latency at the request's price; so a higher price never makes it
    choose a slower one.

    Args:
        space: the knob space.
        accuracy: per example id the accuracy of every configuration, `(configurations,)`; NaN where not run, which is
            an error only where the guardrail admits it.
        predicted_latency_ms: per example id the predicted latency of every configuration, `(configurations,)`.
        full_ms: the full latency that prices are for, milliseconds.

    Raises:
        DataError: the two name different examples or an array does not have one entry per configuration.
    """

    name = "oracle"

    def __init__(
        self,
        space: KnobSpace,
        accuracy: Mapping[str, FloatArray],
        predicted_latency_ms: Mapping[str, FloatArray],
        full_ms: float,
    ) -> None:
        super().__init__(space)
        if set(accuracy) != set(predicted_latency_ms):
            raise DataError(
                f"accuracy knows {len(accuracy)} examples and predicted_latency_ms {len(predicted_latency_ms)}, "
                "not the same ones; give both for every example"
            )
        for table, rows in (("accuracy", accuracy), ("predicted_latency_ms", predicted_latency_ms)):
            for example_id, row in rows.items():
                if np.shape(row) != (len(space),):
                    raise DataError(
                        f"{table} of example {example_id!r} has shape {np.shape(row)}; "
                        f"the knob space asks for ({len(space)},)"
                    )
        self.full_ms = full_ms
        self.accuracy = dict(accuracy)
        self.predicted_latency_ms = dict(predicted_latency_ms)

    def choose(self, request: PolicyInput) -> Knobs:
        """The best feasible configuration; raises DataError for an example or feasible configuration never run."""
        if request.example_id not in self.accuracy:
            raise DataError(
                f"the oracle has no accuracies of example {request.example_id!r}; run it with every knob first"
            )
        admitted = np.flatnonzero(self.feasible(request))
        accuracy = np.asarray(self.accuracy[request.example_id], dtype=np.float64)[admitted]
        if np.isnan(accuracy).any():
            missing = [str(self.space[int(i)]) for i in admitted[np.isnan(accuracy)]]
            raise DataError(
                f"example {request.example_id!r} was never run with {', '.join(missing[:5])} "
                f"({len(missing)} feasible ones in all); the oracle is a ceiling only over all of them"
            )
        latency_ms = np.asarray(self.predicted_latency_ms[request.example_id], dtype=np.float64)[admitted]
        value = accuracy - request.objective.price / 100 * latency_ms / self.full_ms
        return self.space[int(admitted[np.lexsort((latency_ms, -value))[0]])]
