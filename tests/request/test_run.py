"""One request under a budget: the mask, the choice, the clock."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pacings import bounds_of, make_pacing, middle_objective

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.random_feasible import RandomFeasiblePolicy
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import BudgetError, ConfigError, IdentityError, ImageError, QuestionError
from pacevlm.knobs import Compute
from pacevlm.latency.drift import DriftCorrection
from pacevlm.request import stages
from pacevlm.request.pacing import Pacing
from pacevlm.request.run import run_forced, run_request
from pacevlm.types import Answer, Objective, other_kind

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.types import Example

ALL_FIT, NONE_FITS = Objective(1e9), Objective(1e-9)


def make_controller(model: ElasticModel, pacing: Pacing) -> Controller:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Controller(
            ControllerConfig(reference_ms=100.0, embedding_scale=1.0),
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=pacing.guardrail.estimator.fingerprint,
            d_model=model.d_model,
        )


def run(
    model: ElasticModel, policy: Any, example: Example, objective: Objective, pacing: Pacing, **options: Any
) -> Answer:
    return run_request(model, policy, example.image, example.question, objective, pacing, **options)


class SlowPolicy(CheapestPolicy):
    """Spends a known time in each of its three steps, and keeps what it was told."""

    name = "slow"
    pause_s = 0.02

    def choose_tier(self, request: PolicyInput) -> str:
        self.request = request
        time.sleep(self.pause_s)
        return super().choose_tier(request)

    def latency_token(self, request: PolicyInput) -> torch.Tensor:
        assert request is self.request
        time.sleep(self.pause_s)
        return torch.full((self.width,), request.budget_ms)

    def choose_compute(self, request: PolicyInput, tier: str, output: torch.Tensor | None) -> Compute:
        assert request is self.request
        self.output = output
        time.sleep(self.pause_s)
        return super().choose_compute(request, tier, output)


def test_the_policys_own_time_is_inside(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    policy = SlowPolicy(tiny_elastic.knob_space)
    policy.width = tiny_elastic.d_model
    times = run(tiny_elastic, policy, example, ALL_FIT, pacing).times
    pause_ms = policy.pause_s * 1e3
    assert times.stage1_ms >= 2 * pause_ms  # token and tier
    assert times.first_block_ms >= pause_ms
    parts = (times.prepare_ms, times.stage1_ms, times.vision_ms, times.first_block_ms, times.prefill_ms)
    assert times.e2e_ms >= sum(parts) + sum(times.decode_ms) >= 3 * pause_ms
    assert policy.output is not None
    assert policy.output.shape == (tiny_elastic.d_model,)


def test_the_drift_corrections_own_time_is_inside(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock starts before anything is asked of the machine's speed, so that it and the waiting leave no gap."""
    example, pacing, pause_s = law_examples[0], make_pacing(tiny_elastic), 0.02
    drift = DriftCorrection.for_guardrail(pacing.guardrail)

    def check_slowly(*_: Any) -> None:
        time.sleep(pause_s)

    monkeypatch.setattr(drift, "check_guardrail", check_slowly)
    answer = run(tiny_elastic, CheapestPolicy(tiny_elastic.knob_space), example, ALL_FIT, pacing, drift=drift)
    assert answer.times.stage1_ms >= pause_s * 1e3
    assert answer.times.e2e_ms >= pause_s * 1e3


def test_the_answer_is_told_before_its_caches_are_freed(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    example, pacing, alive, told = law_examples[0], make_pacing(tiny_elastic), [], []
    real = stages.Generation

    def made(*args: Any) -> Any:
        generation = real(*args)
        alive.append(weakref.ref(generation))
        return generation

    monkeypatch.setattr(stages, "Generation", made)
    policy = CheapestPolicy(tiny_elastic.knob_space)
    run(tiny_elastic, policy, example, ALL_FIT, pacing, on_answer=lambda _: told.append(alive[0]() is not None))
    assert told == [True]
    assert alive[0]() is None


@pytest.mark.parametrize("name", ["controller", "random", "cheapest"])
def test_admitted_knobs_run(tiny_elastic: ElasticModel, law_examples: list[Example], name: str) -> None:
    pacing, space = make_pacing(tiny_elastic), tiny_elastic.knob_space
    policies = {
        "controller": ControllerPolicy(make_controller(tiny_elastic, pacing)),
        "random": RandomFeasiblePolicy(space, 0),
        "cheapest": CheapestPolicy(space),
    }
    for example in law_examples:
        objective = middle_objective(tiny_elastic, example, pacing)
        paced = run(tiny_elastic, policies[name], example, objective, pacing, example_id=example.example_id)
        assert paced.feasible
        assert paced.upper_bound_ms <= objective.budget_ms
        # The policy chose; the answer is the one that these knobs give.
        forced = run_forced(tiny_elastic, example.image, example.question, paced.knobs)
        assert paced.token_ids == forced.token_ids


def test_where_nothing_fits_the_cheapest_runs(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[2], make_pacing(tiny_elastic)
    for policy in (
        ControllerPolicy(make_controller(tiny_elastic, pacing)),
        RandomFeasiblePolicy(tiny_elastic.knob_space, 0),
    ):
        paced = run(tiny_elastic, policy, example, NONE_FITS, pacing)
        assert paced.knobs == tiny_elastic.knob_space.cheapest
        assert not paced.feasible
        assert not paced.budget_met


def test_the_full_policy_ignores_the_guardrail(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run(tiny_elastic, policy, example, NONE_FITS, pacing)
    assert paced.knobs == tiny_elastic.knob_space.full


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_a_result_is_consistent(tiny_elastic: ElasticModel, law_examples: list[Example], kind: Any) -> None:
    pacing, example = make_pacing(tiny_elastic), law_examples[3]
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run(tiny_elastic, policy, example, Objective(ALL_FIT.budget_ms, kind), pacing)
    view = tiny_elastic.view(example.image, example.question)
    predicted = pacing.guardrail.estimator.predict(view.sizes, paced.knobs, paced.num_output_tokens)
    assert paced.predicted_ms == getattr(predicted, f"{kind}_ms")
    assert paced.measured_ms == getattr(paced.times, f"{kind}_ms")
    assert paced.upper_bound_ms == bounds_of(pacing, view, kind)[-1, -1, -1] > paced.predicted_ms
    assert (paced.kind, paced.budget_ms) == (kind, ALL_FIT.budget_ms)
    assert paced.budget_met
    assert 1 <= paced.num_output_tokens <= tiny_elastic.max_new_tokens
    late = run(tiny_elastic, policy, example, Objective(NONE_FITS.budget_ms, kind), pacing)
    assert not late.budget_met


def slowed(pacing: Pacing, factor: float, kind: Any) -> DriftCorrection:
    """A correction that has come to `factor`, up to rounding."""
    drift = DriftCorrection.for_guardrail(pacing.guardrail, kind)
    for _ in range(200):
        drift.observe(1.0, factor)
    assert drift.factor == pytest.approx(factor, rel=1e-6)
    return drift


def test_without_drift_nothing_changes(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing = make_pacing(tiny_elastic)
    policy = ControllerPolicy(make_controller(tiny_elastic, pacing))
    for example in law_examples:
        objective = middle_objective(tiny_elastic, example, pacing)
        drift = DriftCorrection.for_guardrail(pacing.guardrail)
        plain, fresh = (run(tiny_elastic, policy, example, objective, pacing, drift=one) for one in (None, drift))
        assert plain.drift_factor == fresh.drift_factor == 1.0
        assert (plain.knobs, plain.token_ids) == (fresh.knobs, fresh.token_ids)
        assert (plain.upper_bound_ms, plain.feasible) == (fresh.upper_bound_ms, fresh.feasible)
        assert drift.num_observations == 1


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_a_slower_machine_is_the_profiled_one_with_a_smaller_budget(
    tiny_elastic: ElasticModel, law_examples: list[Example], kind: Any
) -> None:
    example, pacing = law_examples[2], make_pacing(tiny_elastic)
    objective, drift = middle_objective(tiny_elastic, example, pacing, kind), slowed(pacing, 1.5, kind)
    objective = dataclasses.replace(objective, price=7.0)
    budget_ms = objective.budget_ms
    factor, inputs, tokens = drift.factor, [], []

    class Watching(FullPolicy):
        def choose_tier(self, request: PolicyInput) -> str:
            inputs.append(request)
            return super().choose_tier(request)

        def latency_token(self, request: PolicyInput) -> torch.Tensor | None:
            tokens.append(request.budget_ms)
            return super().latency_token(request)

    policy = Watching(tiny_elastic.knob_space)
    paced = run(tiny_elastic, policy, example, objective, pacing, drift=drift)
    view = tiny_elastic.view(example.image, example.question)
    bounds_ms = bounds_of(pacing, view, kind)
    (request,) = inputs
    assert tokens == [request.budget_ms] == [budget_ms / factor]
    assert request.objective.price == paced.price == 7.0  # of full latencies, which are as many times longer
    assert np.array_equal(request.feasible, bounds_ms <= budget_ms / factor)
    assert request.feasible.sum() < (bounds_ms <= budget_ms).sum()
    assert (paced.budget_ms, paced.drift_factor) == (budget_ms, factor)
    assert paced.upper_bound_ms == bounds_ms[-1, -1, -1] * factor
    predicted = pacing.guardrail.estimator.predict(view.sizes, paced.knobs, paced.num_output_tokens)
    assert paced.predicted_ms == getattr(predicted, f"{kind}_ms")


def test_drift_learns_from_the_answers_real_length(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    drift, observed = DriftCorrection.for_guardrail(pacing.guardrail), []
    monkeypatch.setattr(drift, "observe", lambda *latencies_ms: observed.append(latencies_ms))
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run(tiny_elastic, policy, example, ALL_FIT, pacing, num_output_tokens=1, drift=drift)
    assert paced.num_output_tokens == 1
    view = tiny_elastic.view(example.image, example.question)
    assert observed == [(pacing.guardrail.upper_bounds_ms(view.sizes, 1)[-1, -1, -1], paced.measured_ms)]
    assert observed[0][0] < paced.upper_bound_ms


def test_drift_of_another_estimator_is_refused(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    drift = DriftCorrection("another", "e2e")
    with pytest.raises(IdentityError, match="drift correction"):
        run(tiny_elastic, FullPolicy(tiny_elastic.knob_space), example, Objective(10.0), pacing, drift=drift)
    assert drift.num_observations == 0


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_drift_of_one_kind_corrects_the_other_and_learns_of_its_own(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    drift, observed = slowed(pacing, 1.5, other_kind(kind)), []
    monkeypatch.setattr(drift, "observe", lambda *latencies_ms: observed.append(latencies_ms))
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run(tiny_elastic, policy, example, Objective(1e9, kind), pacing, drift=drift)
    view = tiny_elastic.view(example.image, example.question)
    assert paced.upper_bound_ms == bounds_of(pacing, view, kind)[-1, -1, -1] * drift.factor
    ((bound_ms, measured_ms),) = observed
    assert measured_ms == paced.times.covered_ms(other_kind(kind))
    real_ms = pacing.guardrail.upper_bounds_ms(view.sizes, paced.num_output_tokens, other_kind(kind))
    assert bound_ms == real_ms[-1, -1, -1]


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_both_kinds_of_budget_hold(tiny_elastic: ElasticModel, law_examples: list[Example], kind: Any) -> None:
    example, pacing, space = law_examples[2], make_pacing(tiny_elastic), tiny_elastic.knob_space
    view = tiny_elastic.view(example.image, example.question)
    own, other = (bounds_of(pacing, view, each) for each in (kind, other_kind(kind)))
    rng = np.random.default_rng(0)
    policy = RandomFeasiblePolicy(space, 0)
    for _ in range(8):
        limits = (float(rng.choice(own.ravel())), float(rng.choice(other.ravel())))
        objective = Objective(limits[0], kind, other_budget_ms=limits[1])
        seen = pacing.look(view, objective)
        fits = (own <= limits[0]) & (other <= limits[1])
        assert seen.any_feasible == fits.any()
        assert np.array_equal(seen.feasible, fits if fits.any() else np.arange(len(space)).reshape(space.shape) == 0)
    both = Objective(1e9, kind, other_budget_ms=1e-6)
    paced = run(tiny_elastic, policy, example, both, pacing)
    assert (paced.feasible, paced.budget_met, paced.knobs) == (False, False, space.cheapest)
    assert "keeps both" in str(paced.why_infeasible)
    assert paced.measured_ms <= paced.budget_ms
    kept = run(tiny_elastic, policy, example, dataclasses.replace(both, other_budget_ms=1e9), pacing)
    assert kept.budget_met
    late = dataclasses.replace(kept, other_budget_ms=1e-3)
    assert not late.budget_met


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_what_others_leave_makes_knobs_cheaper_and_no_budget_infeasible(
    tiny_elastic: ElasticModel, law_examples: list[Example], kind: Any
) -> None:
    example, pacing, space = law_examples[2], make_pacing(tiny_elastic), tiny_elastic.knob_space
    view = tiny_elastic.view(example.image, example.question)
    bounds_ms = bounds_of(pacing, view)
    policy, objective = RandomFeasiblePolicy(space, 0), Objective(1e9, kind)
    for most_ms in np.quantile(bounds_ms, [0.1, 0.5, 0.9]).tolist():
        for name in "abc":
            paced = run(tiny_elastic, policy, example, objective, pacing, most_ms=most_ms, example_id=name)
            assert bounds_ms[space.place(paced.knobs)] <= most_ms
            assert (paced.feasible, paced.why_infeasible, paced.budget_ms) == (True, None, 1e9)
    paced = run(tiny_elastic, policy, example, objective, pacing, most_ms=0.0)
    assert (paced.knobs, paced.feasible, paced.budget_met) == (space.cheapest, True, True)
    hopeless = run(tiny_elastic, policy, example, Objective(1e-3, kind), pacing, most_ms=1e9)
    assert (hopeless.knobs, hopeless.feasible) == (space.cheapest, False)


def test_a_shorter_answer_is_bounded_lower_and_told_as_it_comes(
    tiny_elastic: ElasticModel, law_examples: list[Example]
) -> None:
    example, pacing, policy = law_examples[3], make_pacing(tiny_elastic), FullPolicy(tiny_elastic.knob_space)
    drift = DriftCorrection.for_guardrail(pacing.guardrail)
    bounds_ms, previous = [], 0.0
    told: list[Any] = []
    for most in (1, 2, tiny_elastic.max_new_tokens, tiny_elastic.max_new_tokens + 5, None):
        told.clear()
        paced = run(
            tiny_elastic,
            policy,
            example,
            ALL_FIT,
            pacing,
            max_new_tokens=most,
            on_choice=lambda *choice: told.append(choice),
            on_token=told.append,
            on_answer=lambda answer: told.append((answer, drift.num_observations)),
            drift=drift,
        )
        before = len(bounds_ms)  # the answer is told before it is learned from
        assert told == [(paced.knobs, paced.upper_bound_ms), *paced.token_ids, (paced, before)]
        assert drift.num_observations == before + 1
        assert paced.num_output_tokens <= (most or tiny_elastic.max_new_tokens)
        bounds_ms.append(paced.upper_bound_ms)
        assert paced.upper_bound_ms >= previous
        previous = paced.upper_bound_ms
    assert bounds_ms[0] < bounds_ms[1] < bounds_ms[2] == bounds_ms[3] == bounds_ms[4]
    with pytest.raises(ConfigError, match="max_new_tokens"):
        run(tiny_elastic, policy, example, ALL_FIT, pacing, max_new_tokens=0)


def test_bad_requests_are_refused(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing, policy, example = make_pacing(tiny_elastic), FullPolicy(tiny_elastic.knob_space), law_examples[0]
    for budget_ms in (0.0, -1.0, float("nan"), float("inf"), "80"):
        with pytest.raises(BudgetError):
            Objective(budget_ms)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ttlt"):
        Objective(10.0, "ttlt")  # type: ignore[arg-type]
    for price in (-1.0, 1001.0, float("nan"), float("inf"), "5", None, True):
        with pytest.raises(ConfigError, match=r"price is .* number from 0 to 1000"):
            Objective(10.0, price=price)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        run_request(tiny_elastic, policy, b"no image", "2?", Objective(10.0), pacing)
    with pytest.raises(QuestionError):
        run_request(tiny_elastic, policy, example.image, "", Objective(10.0), pacing)
