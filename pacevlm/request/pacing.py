"""Pacing: what turns an objective into a mask over knobs, for one request and for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.identity import Identity
from pacevlm.latency.guardrail import Guardrail, feasible_knobs
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.types import BudgetKind, Objective, RequestView, other_kind

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pacing:
    """What turns a budget into a mask over knobs.

    Attributes:
        guardrail: calibrated bounds, which hold its estimator.
        output_length: bounds the tokens of an answer; None always assumes the most that the model may generate.
        max_new_tokens: that most.

    Raises:
        IdentityError: the output lengths were fitted for another model or another `max_new_tokens`.
    """

    guardrail: Guardrail
    output_length: OutputLengthModel | None
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.output_length is not None:
            self.output_length.made_for.check("the output length model", self.made_for)

    @property
    def made_for(self) -> Identity:
        """The model, knob space and device that it paces, and the estimator of its bounds."""
        return replace(self.guardrail.estimator.made_for, max_new_tokens=self.max_new_tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """All that bounds depend on, ready for JSON."""
        return {
            "guardrail": self.guardrail.to_dict(),
            "output_length": None if self.output_length is None else self.output_length.fingerprint,
            "max_new_tokens": self.max_new_tokens,
        }

    def output_tokens_upper(self, views: Sequence[RequestView]) -> NDArray[np.int64]:
        """Bounds on the output tokens of requests that have only been looked at, `(requests,)`."""
        model = self.output_length
        if model is None:
            return np.full(len(views), self.max_new_tokens)
        embeddings = torch.stack([view.question_embedding for view in views]).double().cpu().numpy()
        text = None if model.text_weight is None else [view.sizes.num_text_tokens for view in views]
        return model.upper_many(embeddings, text)

    def upper_bounds_ms(
        self, views: Sequence[RequestView], kind: BudgetKind, max_new_tokens: int | None = None
    ) -> Array:
        """Bounds on requests' latencies under every configuration, `(requests, tiers, top_ks, num_blocks)`.

        Args:
            max_new_tokens: most tokens of these answers, if fewer than the model may generate.

        Raises:
            ProfileError: the guardrail is not calibrated for this kind of budget, or does not fit the knob space.
        """
        sizes = [view.sizes for view in views]
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return self.guardrail.upper_bounds_many_ms(sizes, np.minimum(self.output_tokens_upper(views), most), kind)

    def look(
        self, view: RequestView, objective: Objective, example_id: str = "", max_new_tokens: int | None = None
    ) -> PolicyInput:
        """What a policy is told of one request; raises as `upper_bounds_ms`.

        Args:
            objective: as the machine that was profiled would have to keep it.
            max_new_tokens: most tokens of the answer, if fewer than the model may generate.
        """
        bounds_ms = self.upper_bounds_ms([view], objective.kind, max_new_tokens)
        seen = policy_inputs([view], [objective], bounds_ms, [example_id])[0]
        if objective.other_budget_ms is None or not seen.any_feasible:
            return seen
        other_ms = self.upper_bounds_ms([view], other_kind(objective.kind), max_new_tokens)[0]
        mask, any_feasible = feasible_knobs(
            np.where(seen.feasible, other_ms, np.inf)[None], [objective.other_budget_ms]
        )
        return replace(seen, feasible=mask[0], any_feasible=bool(any_feasible[0]))

    def why_infeasible(self, seen: PolicyInput, objective: Objective, drift_factor: float, waited_ms: float) -> str:
        """Why no configuration is promised to keep an objective, in a sentence.

        Args:
            objective: as it was asked for.
            drift_factor: how many times slower than profiled the machine is.
            waited_ms: what of the budget was gone when the request began.
        """
        beyond = self.guardrail.estimator.beyond(seen.view.sizes)
        if beyond is not None:
            return f"nothing is promised: {beyond}"
        budget = f"budget of {objective.budget_ms:g} ms"
        if waited_ms >= objective.budget_ms:
            return f"the {budget} ran out while waiting {waited_ms:.1f} ms for earlier requests"
        waited = f" after waiting {waited_ms:.1f} ms" if waited_ms >= 0.1 else ""
        lowest_ms = seen.bounds_ms.min() * drift_factor
        if objective.other_budget_ms is not None and lowest_ms <= objective.budget_ms - waited_ms:
            return (
                f"no configuration keeps both the {budget} ({objective.kind}) and the one of "
                f"{objective.other_budget_ms:g} ms ({other_kind(objective.kind)}){waited}"
            )
        return f"the lowest bound is {lowest_ms:.1f} ms, but the budget is {objective.budget_ms:g} ms{waited}"


def policy_inputs(
    views: Sequence[RequestView],
    objectives: Sequence[Objective],
    bounds_ms: Array,
    example_ids: Sequence[str],
    *,
    tightening: ArrayLike = 1.0,
    masked: bool = True,
) -> list[PolicyInput]:
    """What policies are told of requests, one entry each.

    Args:
        bounds_ms: as `Pacing.upper_bounds_ms` gives them, `(requests, tiers, top_ks, num_blocks)`.
        tightening: what the bounds are multiplied by before they are compared with the budgets, `(requests,)`.
        masked: whether what exceeds the budget is ruled out; else everything may run.
    """
    factors = np.broadcast_to(np.asarray(tightening, np.float64), len(views))
    mask, any_feasible = feasible_knobs((bounds_ms.T * factors).T, [objective.budget_ms for objective in objectives])
    if not masked:
        mask[:] = True
    rows = zip(views, objectives, bounds_ms, mask, any_feasible.tolist(), example_ids, strict=True)
    return [PolicyInput(*row) for row in rows]
