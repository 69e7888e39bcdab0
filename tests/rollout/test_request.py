"""One request under a budget: the mask, the choice, the clock."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.random_feasible import RandomFeasiblePolicy
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import BudgetError, IdentityError, ImageError, ProfileError, QuestionError
from pacevlm.latency.drift import DriftCorrection
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.profiler import ProfilerSettings, profile_requests
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.rollout.profiling import profiling_run
from pacevlm.rollout.request import Pacing, policy_input, run_with_policy

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.types import Example

ALL_FIT_MS, NONE_FITS_MS = 1e9, 1e-9


def make_pacing(model: ElasticModel, output_length: OutputLengthModel | None = None, kind: Any = "e2e") -> Pacing:
    """A guardrail with one millisecond per unit of everything."""
    stages = {stage: StageFit((1.0,) * len(terms), 1, 0, 0.0, 0.0) for stage, terms in STAGE_TERMS.items()}
    facts = collect_device_facts("cpu", model.dtype)
    read = StageFit((1.0,) * len(READ_TERMS), 1, 0, 0.0, 0.0)
    pictures = {"memory": PictureFit(read, 100_000, 0, 0), "jpeg": PictureFit(read, 100_000, 100_000, 50_000)}
    estimator = LatencyEstimator(
        model.identity, model.knob_space, facts, model.trained_top_k, model.stage2_after, stages, pictures, 100
    )
    calibration = Calibration(0.1, {}, float(np.log(1.5)), {})
    guardrail = Guardrail(estimator, "none", {"e2e": calibration, "ttft": calibration}, calibration)
    return Pacing(guardrail, output_length, model.max_new_tokens, kind)


def constant_length(model: ElasticModel, tokens: int, text_weight: float | None = None) -> OutputLengthModel:
    weights = (0.0,) * model.d_model
    return OutputLengthModel(model.identity, weights, text_weight, float(tokens), 0, model.max_new_tokens, 0.1)


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


def middle_budget_ms(model: ElasticModel, example: Example, pacing: Pacing) -> float:
    """A budget that some configurations keep and others do not."""
    return float(np.median(pacing.upper_bounds_ms(model.view(example.image, example.question))))


class SlowPolicy(CheapestPolicy):
    """Spends a known time in each of its three steps, and keeps what it was told."""

    name = "slow"
    pause_s = 0.02

    def choose_tier(self, request: PolicyInput) -> str:
        self.request = request
        time.sleep(self.pause_s)
        return super().choose_tier(request)

    def latency_token(self, budget_ms: float) -> torch.Tensor:
        time.sleep(self.pause_s)
        return torch.full((self.width,), budget_ms)

    def choose_compute(self, request: PolicyInput, tier: str, output: torch.Tensor | None) -> tuple[int, int]:
        assert request is self.request
        self.output = output
        time.sleep(self.pause_s)
        return super().choose_compute(request, tier, output)


def test_the_policys_own_time_is_inside(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    policy = SlowPolicy(tiny_elastic.knob_space)
    policy.width = tiny_elastic.d_model
    times = run_with_policy(tiny_elastic, policy, example.image, example.question, ALL_FIT_MS, pacing).result.times
    pause_ms = policy.pause_s * 1e3
    assert times.stage1_ms >= 2 * pause_ms  # token and tier
    assert times.first_block_ms >= pause_ms
    parts = (times.prepare_ms, times.stage1_ms, times.vision_ms, times.first_block_ms, times.prefill_ms)
    assert times.e2e_ms >= sum(parts) + sum(times.decode_ms) >= 3 * pause_ms
    assert policy.output is not None
    assert policy.output.shape == (tiny_elastic.d_model,)


def test_a_policy_is_told_what_the_guardrail_says(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    for example in law_examples:
        pacing = make_pacing(tiny_elastic, constant_length(tiny_elastic, 3))
        budget_ms = middle_budget_ms(tiny_elastic, example, pacing)
        view = tiny_elastic.view(example.image, example.question)
        request = policy_input(view, budget_ms, pacing, example.example_id)
        bounds_ms = pacing.guardrail.upper_bounds_ms(view.sizes, 3)
        assert np.array_equal(request.feasible, bounds_ms <= budget_ms)
        assert request.any_feasible
        assert not request.feasible.all()
        assert (request.example_id, request.budget_ms) == (example.example_id, budget_ms)
        assert (request.sizes, request.image_size) == (view.sizes, (example.image.height, example.image.width))
        assert torch.equal(request.question_embedding, view.question_embedding)


def test_longer_answers_admit_less(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    view = tiny_elastic.view(law_examples[1].image, law_examples[1].question)
    short, long, unknown = (
        make_pacing(tiny_elastic, length)
        for length in (constant_length(tiny_elastic, 1), constant_length(tiny_elastic, 5), None)
    )
    assert (short.upper_bounds_ms(view) < long.upper_bounds_ms(view)).all()
    assert (long.upper_bounds_ms(view) < unknown.upper_bounds_ms(view)).all()
    assert unknown.output_tokens_upper(view) == tiny_elastic.max_new_tokens
    by_text = make_pacing(tiny_elastic, constant_length(tiny_elastic, 0, text_weight=0.1))
    assert by_text.output_tokens_upper(view) == min(
        int(np.ceil(0.1 * view.sizes.num_text_tokens - 1e-6)), tiny_elastic.max_new_tokens
    )
    # Time to the first token does not depend on how many follow.
    first = [make_pacing(tiny_elastic, constant_length(tiny_elastic, n), "ttft").upper_bounds_ms(view) for n in (1, 5)]
    assert np.array_equal(*first)


@pytest.mark.parametrize("name", ["controller", "random", "cheapest"])
def test_admitted_knobs_run(tiny_elastic: ElasticModel, law_examples: list[Example], name: str) -> None:
    pacing, space = make_pacing(tiny_elastic), tiny_elastic.knob_space
    policies = {
        "controller": ControllerPolicy(make_controller(tiny_elastic, pacing)),
        "random": RandomFeasiblePolicy(space, 0),
        "cheapest": CheapestPolicy(space),
    }
    for example in law_examples:
        budget_ms = middle_budget_ms(tiny_elastic, example, pacing)
        paced = run_with_policy(
            tiny_elastic, policies[name], example.image, example.question, budget_ms, pacing, example.example_id
        )
        assert paced.feasible
        assert paced.upper_bound_ms <= budget_ms
        # The policy chose; the answer is the one that these knobs give.
        static = tiny_elastic.run_static(example.image, example.question, paced.result.knobs)
        assert paced.result.token_ids == static.token_ids


def test_where_nothing_fits_the_cheapest_runs(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[2], make_pacing(tiny_elastic)
    for policy in (
        ControllerPolicy(make_controller(tiny_elastic, pacing)),
        RandomFeasiblePolicy(tiny_elastic.knob_space, 0),
    ):
        paced = run_with_policy(tiny_elastic, policy, example.image, example.question, NONE_FITS_MS, pacing)
        assert paced.result.knobs == tiny_elastic.knob_space.cheapest
        assert not paced.feasible
        assert not paced.budget_met


def test_the_full_policy_ignores_the_guardrail(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run_with_policy(tiny_elastic, policy, example.image, example.question, NONE_FITS_MS, pacing)
    assert paced.result.knobs == tiny_elastic.knob_space.full


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_a_result_is_consistent(tiny_elastic: ElasticModel, law_examples: list[Example], kind: str) -> None:
    pacing, example = make_pacing(tiny_elastic, kind=kind), law_examples[3]
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run_with_policy(tiny_elastic, policy, example.image, example.question, ALL_FIT_MS, pacing)
    result = paced.result
    view = tiny_elastic.view(example.image, example.question)
    predicted = pacing.guardrail.estimator.predict(view.sizes, result.knobs, result.num_output_tokens)
    assert paced.predicted_ms == getattr(predicted, f"{kind}_ms")
    assert paced.measured_ms == getattr(result.times, f"{kind}_ms")
    assert paced.upper_bound_ms == pacing.upper_bounds_ms(view)[-1, -1, -1] > paced.predicted_ms
    assert paced.budget_met
    assert 1 <= result.num_output_tokens <= tiny_elastic.max_new_tokens
    late = run_with_policy(tiny_elastic, policy, example.image, example.question, NONE_FITS_MS, pacing)
    assert not late.budget_met


def slowed(pacing: Pacing, factor: float) -> DriftCorrection:
    """A correction that has come to `factor`, up to rounding."""
    drift = DriftCorrection.for_guardrail(pacing.guardrail, pacing.kind)
    for _ in range(200):
        drift.observe(1.0, factor)
    assert drift.factor == pytest.approx(factor, rel=1e-6)
    return drift


def test_without_drift_nothing_changes(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing = make_pacing(tiny_elastic)
    policy = ControllerPolicy(make_controller(tiny_elastic, pacing))
    for example in law_examples:
        budget_ms = middle_budget_ms(tiny_elastic, example, pacing)
        drift = DriftCorrection.for_guardrail(pacing.guardrail)
        plain, fresh = (
            run_with_policy(tiny_elastic, policy, example.image, example.question, budget_ms, pacing, drift=one)
            for one in (None, drift)
        )
        assert plain.drift_factor == fresh.drift_factor == 1.0
        assert (plain.result.knobs, plain.result.token_ids) == (fresh.result.knobs, fresh.result.token_ids)
        assert (plain.upper_bound_ms, plain.feasible) == (fresh.upper_bound_ms, fresh.feasible)
        assert drift.num_observations == 1


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_a_slower_machine_is_the_profiled_one_with_a_smaller_budget(
    tiny_elastic: ElasticModel, law_examples: list[Example], kind: str
) -> None:
    example, pacing = law_examples[2], make_pacing(tiny_elastic, kind=kind)
    budget_ms, drift = middle_budget_ms(tiny_elastic, example, pacing), slowed(pacing, 1.5)
    factor, inputs, tokens = drift.factor, [], []

    class Watching(FullPolicy):
        def choose_tier(self, request: PolicyInput) -> str:
            inputs.append(request)
            return super().choose_tier(request)

        def latency_token(self, budget_ms: float) -> torch.Tensor | None:
            tokens.append(budget_ms)
            return super().latency_token(budget_ms)

    policy = Watching(tiny_elastic.knob_space)
    paced = run_with_policy(tiny_elastic, policy, example.image, example.question, budget_ms, pacing, drift=drift)
    view = tiny_elastic.view(example.image, example.question)
    bounds_ms = pacing.upper_bounds_ms(view)
    (request,) = inputs
    assert tokens == [request.budget_ms] == [budget_ms / factor]
    assert np.array_equal(request.feasible, bounds_ms <= budget_ms / factor)
    assert request.feasible.sum() < (bounds_ms <= budget_ms).sum()
    assert (paced.budget_ms, paced.drift_factor) == (budget_ms, factor)
    assert paced.upper_bound_ms == bounds_ms[-1, -1, -1] * factor
    predicted = pacing.guardrail.estimator.predict(view.sizes, paced.result.knobs, paced.result.num_output_tokens)
    assert paced.predicted_ms == getattr(predicted, f"{kind}_ms")


def test_drift_learns_from_the_answers_real_length(
    tiny_elastic: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    drift, observed = DriftCorrection.for_guardrail(pacing.guardrail), []
    monkeypatch.setattr(drift, "observe", lambda *latencies_ms: observed.append(latencies_ms))
    policy = FullPolicy(tiny_elastic.knob_space)
    paced = run_with_policy(
        tiny_elastic, policy, example.image, example.question, ALL_FIT_MS, pacing, num_output_tokens=1, drift=drift
    )
    assert paced.result.num_output_tokens == 1
    view = tiny_elastic.view(example.image, example.question)
    assert observed == [(pacing.guardrail.upper_bounds_ms(view.sizes, 1)[-1, -1, -1], paced.measured_ms)]
    assert observed[0][0] < paced.upper_bound_ms


def test_a_larger_factor_never_admits_more(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing = make_pacing(tiny_elastic)
    for example in law_examples:
        view = tiny_elastic.view(example.image, example.question)
        for budget_ms in np.quantile(pacing.upper_bounds_ms(view), [0.1, 0.5, 0.9, 1.0]).tolist():
            masks = []
            for factor in (0.7, 1.0, 1.1, 1.5, 3.0, 16.0):
                request = policy_input(view, budget_ms / factor, pacing)
                masks.append(request.feasible & request.any_feasible)
            assert all((more >= less).all() for more, less in itertools.pairwise(masks))


def test_drift_of_another_kind_or_estimator_is_refused(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    example, pacing = law_examples[0], make_pacing(tiny_elastic)
    policy = FullPolicy(tiny_elastic.knob_space)
    for drift in (
        DriftCorrection.for_guardrail(pacing.guardrail, "ttft"),
        DriftCorrection("another", "e2e"),
    ):
        with pytest.raises(IdentityError, match="drift correction"):
            run_with_policy(tiny_elastic, policy, example.image, example.question, 10.0, pacing, drift=drift)
        assert drift.num_observations == 0


def test_bad_requests_are_refused(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    pacing, policy, example = make_pacing(tiny_elastic), FullPolicy(tiny_elastic.knob_space), law_examples[0]
    for budget_ms in (0.0, -1.0, float("nan"), float("inf"), "80"):
        with pytest.raises(BudgetError):
            run_with_policy(tiny_elastic, policy, example.image, "2?", budget_ms, pacing)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        run_with_policy(tiny_elastic, policy, b"no image", "2?", 10.0, pacing)
    with pytest.raises(QuestionError):
        run_with_policy(tiny_elastic, policy, example.image, "", 10.0, pacing)


def test_other_models_artefacts_are_refused(tiny_elastic: ElasticModel) -> None:
    lengths = OutputLengthModel(
        "another", (0.0,) * tiny_elastic.d_model, None, 1.0, 0, tiny_elastic.max_new_tokens, 0.1
    )
    with pytest.raises(IdentityError, match="another"):
        make_pacing(tiny_elastic, lengths)
    shorter = OutputLengthModel(tiny_elastic.identity, (0.0,) * tiny_elastic.d_model, None, 1.0, 0, 2, 0.1)
    with pytest.raises(IdentityError, match="at most 2 new tokens"):
        make_pacing(tiny_elastic, shorter)


def test_the_profiler_times_what_is_served(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    requests = [(example.image, example.question) for example in law_examples]
    state = torch.random.get_rng_state()
    run = profiling_run(tiny_elastic, requests)
    assert torch.equal(torch.random.get_rng_state(), state)
    settings = ProfilerSettings(num_requests=4, num_samples=12, repeats=1, max_warmup=2, max_output_tokens=3)
    profile = profile_requests(
        run, tiny_elastic.knob_space, settings, model_identity=tiny_elastic.identity, device="cpu", dtype="float32"
    )
    assert len(profile.samples) == 12
    space = tiny_elastic.knob_space
    forced_lengths = [s.num_output_tokens for s in profile.samples if s.knobs not in (space.cheapest, space.full)]
    assert all(length <= 3 for length in forced_lengths)
    assert all(sample.stages.stage1_ms > 0 for sample in profile.samples)
    # The forced knobs do not change what comes out.
    knobs = tiny_elastic.knob_space[7]
    forced = run(1, knobs, None)
    assert forced.token_ids == tiny_elastic.run_static(*requests[1], knobs).token_ids
    with pytest.raises(ProfileError, match="no requests"):
        profiling_run(tiny_elastic, [])


def test_a_pacings_identity_tells_everything_that_bounds_depend_on(tiny_elastic: ElasticModel) -> None:
    pacing = make_pacing(tiny_elastic, constant_length(tiny_elastic, 2))
    guardrail = pacing.guardrail
    wider = Calibration(0.1, {}, float(np.log(1.6)), {})
    others = [
        replace(pacing, kind="ttft"),
        replace(pacing, output_length=None),
        replace(pacing, output_length=constant_length(tiny_elastic, 1)),
        replace(pacing, guardrail=replace(guardrail, picture=wider)),
        replace(pacing, guardrail=replace(guardrail, group_by="tier")),
        replace(pacing, guardrail=replace(guardrail, calibrations={**guardrail.calibrations, "e2e": wider})),
        replace(pacing, guardrail=replace(guardrail, estimator=replace(guardrail.estimator, max_text_tokens=101))),
    ]
    told = [json.dumps(each.identity, sort_keys=True) for each in (pacing, *others)]
    assert len(set(told)) == len(told)
    again = make_pacing(tiny_elastic, constant_length(tiny_elastic, 2))
    assert json.dumps(again.identity, sort_keys=True) == told[0]
