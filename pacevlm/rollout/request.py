"""One request under a budget, with any policy: look, ask the guardrail, let the policy choose, run, time it all."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import IdentityError
from pacevlm.images import ImageSource
from pacevlm.knobs import check_budget_ms
from pacevlm.latency.drift import DriftCorrection
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.models.elastic import ElasticModel, RequestResult, RequestView
from pacevlm.types import BudgetKind

# What a budget counts as once it is spent; less than any request takes.
SPENT_BUDGET_MS = 1e-6


@dataclass(frozen=True)
class Pacing:
    """What turns a budget into a mask over knobs.

    Attributes:
        guardrail: calibrated bounds, which hold its estimator.
        output_length: bounds the tokens of an answer; None always assumes the most that the model may generate.
        max_new_tokens: that most.
        kind: what a budget covers.

    Raises:
        IdentityError: the output lengths were fitted for another model or another `max_new_tokens`.
    """

    guardrail: Guardrail
    output_length: OutputLengthModel | None
    max_new_tokens: int
    kind: BudgetKind = "e2e"

    def __post_init__(self) -> None:
        if self.output_length is None:
            return
        if self.output_length.model_identity != self.guardrail.estimator.model_identity:
            raise IdentityError(
                f"output lengths were fitted for model {self.output_length.model_identity!r}, latencies for "
                f"{self.guardrail.estimator.model_identity!r}; fit both for one model"
            )
        if self.output_length.max_new_tokens != self.max_new_tokens:
            raise IdentityError(
                f"output lengths were fitted for at most {self.output_length.max_new_tokens} new tokens, but the model "
                f"generates up to {self.max_new_tokens}; fit them anew"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """All that bounds depend on, ready for JSON."""
        return {
            "guardrail": self.guardrail.to_dict(),
            "output_length": None if self.output_length is None else self.output_length.fingerprint,
            "max_new_tokens": self.max_new_tokens,
            "kind": self.kind,
        }

    def check_model(self, model: ElasticModel) -> None:
        """Raise IdentityError unless everything was made for this model and knob space."""
        self.guardrail.estimator.check_identity(model_identity=model.identity, knob_space=model.knob_space)
        if self.max_new_tokens != model.max_new_tokens:
            raise IdentityError(
                f"output lengths are bounded by {self.max_new_tokens} new tokens, but the model generates up to "
                f"{model.max_new_tokens}"
            )

    def output_tokens_upper(self, view: RequestView) -> int:
        """Bound on the output tokens of a request that has only been looked at."""
        model = self.output_length
        if model is None:
            return self.max_new_tokens
        text = None if model.text_weight is None else view.sizes.num_text_tokens
        return model.upper(view.question_embedding.double().cpu().numpy(), text)

    def upper_bounds_ms(self, view: RequestView) -> NDArray[np.float64]:
        """Bound on a request's latency under every configuration, `(tiers, top_ks, num_blocks)`, milliseconds."""
        return self.guardrail.upper_bounds_ms(view.sizes, self.output_tokens_upper(view), self.kind)


def policy_input(view: RequestView, budget_ms: float, pacing: Pacing, example_id: str = "") -> PolicyInput:
    """What a policy is told of a request: its looks, its budget, and the guardrail's mask.

    Raises:
        BudgetError: the budget is not a positive, finite number.
        ProfileError: the guardrail is not calibrated for this kind of budget, or does not fit the knob space.
    """
    mask, any_feasible = pacing.guardrail.feasible_mask(
        view.sizes, budget_ms, pacing.output_tokens_upper(view), pacing.kind
    )
    return PolicyInput(
        example_id=example_id,
        budget_ms=budget_ms,
        question_embedding=view.question_embedding,
        image_size=view.image_size,
        sizes=view.sizes,
        feasible=mask,
        any_feasible=any_feasible,
        picture=view.picture,
    )


def why_nothing_fits(
    request: PolicyInput, pacing: Pacing, bounds_ms: NDArray[np.float64], budget_ms: float, waited_ms: float
) -> str | None:
    """Why no configuration is promised to keep the budget, in a sentence; None where one is.

    Args:
        bounds_ms: bounds on the latency of every configuration, corrected for drift.
        waited_ms: what of the budget was gone when the request began.
    """
    if request.any_feasible:
        return None
    beyond = pacing.guardrail.estimator.beyond(request.sizes)
    if beyond is not None:
        return f"nothing is promised: {beyond}"
    if waited_ms >= budget_ms:
        return f"the budget of {budget_ms:g} ms ran out while waiting {waited_ms:.1f} ms for earlier requests"
    waited = f" after waiting {waited_ms:.1f} ms" if waited_ms > 0.0 else ""
    return f"the lowest bound is {bounds_ms.min():.1f} ms, but the budget is {budget_ms:g} ms{waited}"


@dataclass(frozen=True)
class PacedResult:
    """A request that a policy ran under a budget.

    Attributes:
        result: answer, knobs, sizes and times; the times include the guardrail and the policy.
        budget_ms: the budget.
        feasible: whether any configuration's upper bound kept what was left of the budget when the request began.
        predicted_ms: the estimator's latency of the knobs that ran, with the output length that the answer had.
            Neither drift nor waiting enters: it is the latency on the machine as profiled.
        upper_bound_ms: the guardrail's bound on these knobs, known before the answer was; corrected for drift, and
            infinite beyond what was profiled. Waiting comes on top.
        measured_ms: wall-clock time of what the budget covers, waiting included.
        drift_factor: what the guardrail's bounds were multiplied by for this request; 1 without a correction.
        waited_ms: how much of the budget was gone before the request began.
        why_infeasible: why nothing was feasible, in a sentence; None where something was.
    """

    result: RequestResult
    budget_ms: float
    feasible: bool
    predicted_ms: float
    upper_bound_ms: float
    measured_ms: float
    drift_factor: float = 1.0
    waited_ms: float = 0.0
    why_infeasible: str | None = None

    @property
    def budget_met(self) -> bool:
        """Whether the budget could be kept and was."""
        return self.feasible and self.measured_ms <= self.budget_ms


def run_with_policy(
    model: ElasticModel,
    policy: Policy,
    image: ImageSource,
    question: str,
    budget_ms: float,
    pacing: Pacing,
    example_id: str = "",
    num_output_tokens: int | None = None,
    drift: DriftCorrection | None = None,
    waited_ms: float = 0.0,
) -> PacedResult:
    """Run one request alone, with the knobs that a policy chooses for a budget.

    The measured time begins with the source given, whose reading and decoding it holds. Everything that the choice
    takes is inside too: encoding the budget, bounding the output length, bounding all latencies, and both stages of the
    policy. Where nothing fits, the mask holds the cheapest knobs alone. Answers are never cut short for a budget.

    A machine that is f times slower is the profiled machine with a budget f times smaller: with a drift correction,
    the guardrail and the policy are given the budget divided by its factor, and what the request took is observed.

    Args:
        image: path, bytes, PIL image or array.
        question: the user's text.
        example_id: identity of the request, the seed of policies that draw at random.
        num_output_tokens: generate exactly so many tokens, for measurements; as many as the answer has if None.
        drift: correction of the guardrail's bounds; it learns from the running time of this request, unless that is
            beyond what was profiled.
        waited_ms: what of the budget is gone already; the rest is what guardrail and policy are given.

    Raises:
        BudgetError: the budget is not a positive, finite number.
        ImageError, QuestionError: the input cannot be used.
        IdentityError: the drift correction is one of another estimator or kind of budget.
        KnobError: the policy chose knobs outside the knob space.
    """
    budget_ms = check_budget_ms(budget_ms)
    if drift is not None:
        drift.check_guardrail(pacing.guardrail, pacing.kind)
    request: PolicyInput | None = None
    seen: RequestView | None = None

    def choose_tier(view: RequestView) -> str:
        nonlocal request, seen
        seen, request = view, policy_input(view, profiled_budget_ms, pacing, example_id)
        return policy.choose_tier(request)

    def choose_compute(tier: str, latency_token_output: Tensor | None) -> tuple[int, int]:
        assert request is not None
        return policy.choose_compute(request, tier, latency_token_output)

    started = time.perf_counter()
    drift_factor = 1.0 if drift is None else drift.factor
    # The budget that the machine as profiled would have to keep. One that ran out while waiting admits nothing.
    profiled_budget_ms = max(budget_ms - waited_ms, SPENT_BUDGET_MS) / drift_factor
    latency_token = policy.latency_token(profiled_budget_ms)
    model.synchronise()
    token_ms = (time.perf_counter() - started) * 1e3
    result = model.run_request(
        image,
        question,
        choose_tier=choose_tier,
        choose_compute=choose_compute,
        latency_token=latency_token,
        num_output_tokens=num_output_tokens,
    )
    assert request is not None
    assert seen is not None
    # The budget is encoded before the model's own clock starts; it is part of stage 1 all the same.
    times = dataclasses.replace(
        result.times, stage1_ms=result.times.stage1_ms + token_ms, e2e_ms=result.times.e2e_ms + token_ms
    )
    result = dataclasses.replace(result, times=times)
    predicted = pacing.guardrail.estimator.predict(request.sizes, result.knobs, result.num_output_tokens)
    place = np.unravel_index(model.knob_space.index(result.knobs), model.knob_space.shape)
    e2e = pacing.kind == "e2e"
    running_ms = times.e2e_ms if e2e else times.ttft_ms
    if drift is not None and pacing.guardrail.estimator.beyond(request.sizes) is None:
        real_bounds_ms = pacing.guardrail.upper_bounds_ms(request.sizes, result.num_output_tokens, pacing.kind)
        drift.observe(float(real_bounds_ms[place]), running_ms)
    bounds_ms = pacing.upper_bounds_ms(seen) * drift_factor
    return PacedResult(
        result=result,
        budget_ms=budget_ms,
        feasible=request.any_feasible,
        predicted_ms=predicted.e2e_ms if e2e else predicted.ttft_ms,
        upper_bound_ms=float(bounds_ms[place]),
        measured_ms=waited_ms + running_ms,
        drift_factor=drift_factor,
        waited_ms=waited_ms,
        why_infeasible=why_nothing_fits(request, pacing, bounds_ms, budget_ms, waited_ms),
    )
