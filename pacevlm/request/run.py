"""One request as a straight line: read and look, choose the tier, encode, choose the compute, finish."""

from __future__ import annotations

import dataclasses

from pacevlm.controller.policy_interface import Policy
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs
from pacevlm.latency.drift import DriftCorrection
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.pacing import Pacing
from pacevlm.request.stages import open_request
from pacevlm.types import Answer, Objective

# What a budget counts as once it is spent; less than any request takes.
SPENT_BUDGET_MS = 1e-6


def run_request(
    model: ElasticModel,
    policy: Policy,
    image: ImageSource | None,
    question: str,
    objective: Objective,
    pacing: Pacing,
    *,
    example_id: str = "",
    num_output_tokens: int | None = None,
    drift: DriftCorrection | None = None,
    waited_ms: float = 0.0,
) -> Answer:
    """Run one request alone, with the knobs that a policy chooses for an objective.

    The measured time begins with the source given, whose reading and decoding it holds. Everything that the choice
    takes is inside too: bounding the output length and all latencies, encoding the budget, and both stages of the
    policy. Where nothing fits, the mask holds the cheapest knobs alone. Answers are never cut short for a budget.

    A machine that is f times slower is the profiled machine with a budget f times smaller: with a drift correction,
    the guardrail and the policy are given the budget divided by its factor, and what the request took is observed.

    Args:
        image: path, bytes, PIL image or array; None for a question alone.
        question: the user's text.
        objective: what is asked for.
        example_id: identity of the request, the seed of policies that draw at random.
        num_output_tokens: generate exactly so many tokens, for measurements; as many as the answer has if None.
        drift: correction of the guardrail's bounds; it learns from the running time of this request, unless that is
            beyond what was profiled, or has no image.
        waited_ms: what of the budget is gone already; the rest is what guardrail and policy are given.

    Raises:
        ImageError, QuestionError: the input cannot be used.
        IdentityError: the drift correction is one of another estimator or kind of budget.
        KnobError: the policy chose knobs outside the knob space.
    """
    kind, guardrail = objective.kind, pacing.guardrail
    if drift is not None:
        drift.check_guardrail(guardrail, kind)
    drift_factor = 1.0 if drift is None else drift.factor
    # What the machine as profiled would have to keep. A budget that ran out while waiting admits nothing.
    # The price stays: it is one of full latencies, which grow as the predictions do.
    left_ms = max(objective.budget_ms - waited_ms, SPENT_BUDGET_MS)
    profiled = dataclasses.replace(objective, budget_ms=left_ms / drift_factor)

    with open_request(model, image, question, num_output_tokens=num_output_tokens) as request:
        seen = pacing.look(request.view, profiled, example_id)
        tier = policy.choose_tier(seen)
        token = request.encode(tier, policy.latency_token(seen))
        answer = request.finish(policy.choose_compute(seen, tier, token))

    place = model.knob_space.place(answer.knobs)
    predicted = guardrail.estimator.predict(answer.sizes, answer.knobs, answer.num_output_tokens)
    if drift is not None and image is not None and guardrail.estimator.beyond(answer.sizes) is None:
        real_bounds_ms = guardrail.upper_bounds_ms(answer.sizes, answer.num_output_tokens, kind)
        drift.observe(float(real_bounds_ms[place]), answer.times.covered_ms(kind))
    why = None if seen.any_feasible else pacing.why_infeasible(seen, objective, drift_factor, waited_ms)
    return dataclasses.replace(
        answer,
        budget_ms=objective.budget_ms,
        kind=kind,
        price=objective.price,
        feasible=seen.any_feasible,
        predicted_ms=predicted.covered_ms(kind),
        upper_bound_ms=float(seen.bounds_ms[place]) * drift_factor,
        drift_factor=drift_factor,
        waited_ms=waited_ms,
        why_infeasible=why,
    )


def run_forced(
    model: ElasticModel,
    image: ImageSource | None,
    question: str,
    knobs: Knobs,
    *,
    max_new_tokens: int | None = None,
    num_output_tokens: int | None = None,
) -> Answer:
    """Run one request alone with given knobs and no budget; arguments and errors as of `open_request`.

    Raises:
        KnobError: the knobs are not in the knob space.
    """
    model.knob_space.index(knobs)
    with open_request(
        model, image, question, max_new_tokens=max_new_tokens, num_output_tokens=num_output_tokens
    ) as request:
        request.encode(knobs.tier)
        return request.finish(knobs.compute)
