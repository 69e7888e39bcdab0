"""One request as a straight line: read and look, choose the tier, encode, choose the compute, finish."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from pacevlm.checks import whole_number
from pacevlm.controller.policy_interface import Policy
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs
from pacevlm.latency.drift import DriftCorrection
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.pacing import Pacing
from pacevlm.request.stages import open_request
from pacevlm.types import Answer, BudgetKind, Objective, other_kind

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
    most_ms: float = math.inf,
    max_new_tokens: int | None = None,
    on_choice: Callable[[Knobs, float], None] | None = None,
    on_token: Callable[[int], None] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
) -> Answer:
    """Run one request alone, with the knobs that a policy chooses for an objective.

    The measured time begins with the call, so it holds the reading and decoding of the source given. Everything that
    the choice takes is inside too: correcting for drift, bounding the output length and all latencies, encoding the
    budget, and both stages of the policy. Where nothing fits, the mask holds the cheapest knobs alone. Answers are
    never cut short for a budget.

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
        most_ms: what others leave it, from now on, for the whole request; it makes knobs cheaper, and no budget
            infeasible.
        max_new_tokens: most tokens of the answer; the model's own limit if None, or if that is lower.
        on_choice: told the knobs before they run, and the upper bound on the whole request, corrected for drift.
        on_token: told every token as it is generated.
        on_answer: told the answer before anything is learned of it or given back.

    Raises:
        ImageError, QuestionError: the input cannot be used.
        IdentityError: the drift correction is one of another estimator.
        KnobError: the policy chose knobs outside the knob space.
    """
    most = None
    if max_new_tokens is not None:
        most = min(whole_number("max_new_tokens", max_new_tokens), model.max_new_tokens)

    with open_request(model, image, question, max_new_tokens=most, num_output_tokens=num_output_tokens) as request:
        kind, guardrail, space = objective.kind, pacing.guardrail, model.knob_space
        if drift is not None:
            drift.check_guardrail(guardrail, drift.kind)
        drift_factor = 1.0 if drift is None else drift.factor
        own = _left(objective, waited_ms, math.inf, drift_factor)
        given = own if most_ms == math.inf else _left(objective, waited_ms, most_ms, drift_factor)
        seen = pacing.look(request.view, given, example_id, most)
        tier = policy.choose_tier(seen)
        token = request.encode(tier, policy.latency_token(seen))
        compute = policy.choose_compute(seen, tier, token)
        if on_choice is not None:
            knobs = Knobs(tier, *compute)
            bounds_ms = seen.bounds_ms if kind == "e2e" else pacing.upper_bounds_ms([request.view], "e2e", most)[0]
            on_choice(knobs, float(bounds_ms[space.place(knobs)]) * drift_factor)
        answer = request.finish(compute, on_token)

    place = space.place(answer.knobs)
    predicted = guardrail.estimator.predict(answer.sizes, answer.knobs, answer.num_output_tokens)
    feasible = seen.any_feasible or (given is not own and pacing.look(request.view, own, "", most).any_feasible)
    why = None if feasible else pacing.why_infeasible(seen, objective, drift_factor, waited_ms)
    answer = dataclasses.replace(
        answer,
        budget_ms=objective.budget_ms,
        kind=kind,
        price=objective.price,
        feasible=feasible,
        predicted_ms=predicted.covered_ms(kind),
        upper_bound_ms=float(seen.bounds_ms[place]) * drift_factor,
        drift_factor=drift_factor,
        waited_ms=waited_ms,
        why_infeasible=why,
        other_budget_ms=objective.other_budget_ms,
    )
    if on_answer is not None:
        on_answer(answer)
    if drift is not None and image is not None and guardrail.estimator.beyond(answer.sizes) is None:
        real_bounds_ms = guardrail.upper_bounds_ms(answer.sizes, answer.num_output_tokens, drift.kind)
        drift.observe(float(real_bounds_ms[place]), answer.times.covered_ms(drift.kind))
    return answer


def _left(objective: Objective, waited_ms: float, most_ms: float, drift_factor: float) -> Objective:
    """What the machine as profiled would have to keep; a budget that ran out while waiting admits nothing.

    The price stays: it is one of full latencies, which grow as the predictions do.
    """
    left_ms: dict[BudgetKind, float] = {objective.kind: objective.budget_ms - waited_ms}
    if objective.other_budget_ms is not None:
        left_ms[other_kind(objective.kind)] = objective.other_budget_ms - waited_ms
    if most_ms < math.inf:
        left_ms["e2e"] = min(left_ms.get("e2e", math.inf), most_ms)
    profiled_ms = {kind: max(left, SPENT_BUDGET_MS) / drift_factor for kind, left in left_ms.items()}
    other_ms = profiled_ms.get(other_kind(objective.kind))
    return dataclasses.replace(objective, budget_ms=profiled_ms[objective.kind], other_budget_ms=other_ms)


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
