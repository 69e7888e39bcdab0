"""The sweep on a tiny random model, whose estimator is made up so that budgets divide the knob space."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.config import EvaluateConfig
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.data.metrics import load_metric
from pacevlm.errors import DataError, IdentityError
from pacevlm.evaluation import timed
from pacevlm.evaluation.summary import POLICY_ORDER
from pacevlm.evaluation.sweep import (
    Evaluation,
    build_requests,
    choose_knobs,
    evaluate,
    exhaustive_sweep,
    feasible_table,
    fit_baselines,
    summarise_answers,
)
from pacevlm.knobs import Knobs
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.pacing import Pacing
from pacevlm.request.run import run_forced, run_request
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Answer, Example, Objective

COEFFICIENTS = {
    "prepare_ms": {"constant": 1.0},
    "vision_ms": {"units": 2.0},
    "prefill_ms": {"later_blocks": 1.0, "later_blocks*top_k": 0.5},
    "decode_ms_per_token": {"constant": 0.1},
}
FRACTIONS = (0.3, 0.6, 0.9)
FULL_MS = 30.0
# The estimator is made up, so that what requests really take says nothing about the bounds.
CONFIG = EvaluateConfig(budgets=FRACTIONS, num_timed=3, num_warmup=1, track_drift=False)


def make_pacing(model: ElasticModel) -> Pacing:
    stages = {
        stage: StageFit(tuple(COEFFICIENTS.get(stage, {}).get(term, 0.0) for term in terms), 1, 0, 0.0, 0.0)
        for stage, terms in STAGE_TERMS.items()
    }
    estimator = LatencyEstimator(
        model.identity,
        model.knob_space,
        collect_device_facts("cpu", "float32"),
        model.trained_top_k,
        model.stage2_after,
        stages,
        {"memory": PictureFit(StageFit((0.0,) * len(READ_TERMS), 1, 0, 0.0, 0.0), 10**9, 10**9, 0)},
        10**6,
    )
    calibration = Calibration(0.1, {"all": 0.05}, 0.05, {"all": 100})
    guardrail = Guardrail(estimator, "none", {"e2e": calibration, "ttft": calibration}, calibration)
    return Pacing(guardrail, None, model.max_new_tokens)


def make_examples(engine: RolloutEngine, count: int, seed: int) -> list[Example]:
    """Each example's reference is what the model says with some configuration, so that knobs decide who is right."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        height, width = rng.integers(20, 90, 2).tolist()
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        question = ("How many red digits are there?", "Which number is the largest?")[i % 2]
        knobs = engine.model.knob_space[int(rng.integers(len(engine.model.knob_space)))]
        answer = run_forced(engine.model, image, question, knobs).answer
        examples.append(Example(f"{seed}-{i}", image, question, (answer,), {"family": "ab"[i % 2], "size": height}))
    return examples


@pytest.fixture(scope="module")
def engine(tiny_elastic: ElasticModel) -> RolloutEngine:
    return RolloutEngine(tiny_elastic)


@pytest.fixture(scope="module")
def pacing(tiny_elastic: ElasticModel) -> Pacing:
    return make_pacing(tiny_elastic)


@pytest.fixture(scope="module")
def train(engine: RolloutEngine) -> list[Example]:
    return make_examples(engine, 10, seed=1)


@pytest.fixture(scope="module")
def test(engine: RolloutEngine) -> list[Example]:
    return make_examples(engine, 8, seed=2)


@pytest.fixture(scope="module")
def objectives(engine: RolloutEngine, test: list[Example], pacing: Pacing) -> list[Objective]:
    full_ms = np.median(pacing.upper_bounds_ms([engine.view(example) for example in test], "e2e").max(axis=(1, 2, 3)))
    return [Objective(fraction * float(full_ms)) for fraction in FRACTIONS]


@pytest.fixture(scope="module")
def controller(tiny_elastic: ElasticModel, pacing: Pacing) -> ControllerPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controller = Controller(
            ControllerConfig(reference_ms=30.0, embedding_scale=0.25),
            model_identity=tiny_elastic.identity,
            knob_space=tiny_elastic.knob_space,
            estimator_fingerprint=pacing.guardrail.estimator.fingerprint,
            d_model=tiny_elastic.d_model,
        )
        for parameter in controller.parameters():  # opinionated, so that requests differ in what they get
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.5)
    return ControllerPolicy(controller)


@pytest.fixture(scope="module")
def evaluation(
    engine: RolloutEngine,
    pacing: Pacing,
    train: list[Example],
    test: list[Example],
    objectives: list[Objective],
    controller: ControllerPolicy,
) -> Evaluation:
    baselines = fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS)
    return evaluate(engine.model, engine, [controller, *baselines], test, objectives, pacing, CONFIG, full_ms=FULL_MS)


def test_the_material_is_worth_testing_with(evaluation: Evaluation) -> None:
    accuracies = {record.accuracy for record in evaluation.records if record.policy == "random"}
    assert accuracies == {0.0, 1.0}
    assert len({record.knobs for record in evaluation.records if record.policy == "controller"}) > 3
    assert {record.feasible for record in evaluation.records} == {True, False}


def test_records_are_complete(evaluation: Evaluation, test: list[Example]) -> None:
    keys = Counter((record.policy, record.fraction, record.example_id) for record in evaluation.records)
    assert set(keys) == {
        (name, fraction, example.example_id) for name in POLICY_ORDER for fraction in FRACTIONS for example in test
    }
    assert set(keys.values()) == {1}
    assert {record.family for record in evaluation.records} == {"a", "b"}


def test_no_guarded_policy_beats_the_oracle_on_any_request(evaluation: Evaluation) -> None:
    best = {(r.fraction, r.example_id): r.accuracy for r in evaluation.records if r.policy == "oracle"}
    for record in evaluation.records:
        if record.policy != "full":
            assert record.accuracy <= best[record.fraction, record.example_id], record


def test_guarded_policies_run_only_what_the_guardrail_admits(
    evaluation: Evaluation, engine: RolloutEngine, test: list[Example], objectives: list[Objective], pacing: Pacing
) -> None:
    space = engine.model.knob_space
    requests = build_requests(engine, test, objectives, pacing)
    masks = {
        (fraction, request.example_id): request.feasible.reshape(-1)
        for fraction, row in zip(FRACTIONS, requests, strict=True)
        for request in row
    }
    for record in evaluation.records:
        if record.policy != "full":
            assert masks[record.fraction, record.example_id][space.index(record.knobs)]
    assert feasible_table(requests).shape == (len(FRACTIONS), len(test), len(space))


def test_records_hold_the_outcome_and_the_prediction_of_their_knobs(
    evaluation: Evaluation, engine: RolloutEngine, test: list[Example], pacing: Pacing
) -> None:
    by_id = {example.example_id: example for example in test}
    for record in evaluation.records:
        example = by_id[record.example_id]
        outcome = engine.store.get(example.content_id, record.knobs)
        assert outcome is not None
        assert (record.accuracy, record.metadata["answer"]) == (engine.metric(outcome.answer, example), outcome.answer)
        sizes = engine.view(example).sizes
        predicted = pacing.guardrail.estimator.predict(sizes, record.knobs, outcome.num_output_tokens)
        assert record.predicted_latency_ms == pytest.approx(predicted.e2e_ms)


def test_the_same_examples_are_timed_for_every_policy_and_budget(evaluation: Evaluation) -> None:
    timed = defaultdict(set)
    for record in evaluation.records:
        assert (record.latency_ms is not None) == ("e2e_ms" in record.metadata)
        if record.latency_ms is not None:
            timed[record.policy, record.fraction].add(record.example_id)
    (examples,) = {frozenset(ids) for ids in timed.values()}
    assert len(timed) == len(POLICY_ORDER) * len(FRACTIONS)
    assert len(examples) == CONFIG.num_timed
    assert evaluation.num_timed_requests == len(timed) * CONFIG.num_timed


def test_requests_alone_agree_with_the_batch(evaluation: Evaluation) -> None:
    assert evaluation.num_disagreements == 0
    for record in evaluation.records:
        assert not {"timed_answer", "timed_knobs"} & set(record.metadata)


def test_batched_choices_are_those_of_single_requests(
    engine: RolloutEngine,
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
    controller: ControllerPolicy,
) -> None:
    for objective, row in zip(objectives, build_requests(engine, test, objectives, pacing), strict=True):
        chosen = choose_knobs(controller, engine, test, row)
        for example, request, knobs in zip(test, row, chosen, strict=True):
            alone = run_request(engine.model, controller, example.image, example.question, objective, pacing)
            assert alone.knobs == knobs
            assert alone.feasible == request.any_feasible


def test_an_exhaustive_sweep_is_remembered(tiny_elastic: ElasticModel, test: list[Example]) -> None:
    engine = RolloutEngine(tiny_elastic)
    seen: list[tuple[int, int]] = []
    accuracy = exhaustive_sweep(engine, test[:2], lambda done, todo: seen.append((done, todo)))
    space = tiny_elastic.knob_space
    assert accuracy.shape == (2, len(space))
    assert seen[-1] == (2 * len(space), 2 * len(space)) == (engine.num_run, engine.num_run)
    for i, example in enumerate(test[:2]):
        for knobs in (space.cheapest, space.full, Knobs("medium", 3, 5)):
            alone = run_forced(tiny_elastic, example.image, example.question, knobs).answer
            assert accuracy[i, space.index(knobs)] == engine.metric(alone, example)
    assert np.array_equal(exhaustive_sweep(engine, test[:2]), accuracy)
    assert engine.num_run == 2 * len(space)


def test_baselines_are_fitted_on_training_examples_under_the_same_guardrail(
    engine: RolloutEngine, train: list[Example], objectives: list[Objective], pacing: Pacing
) -> None:
    policies = fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS, seed=3)
    budgets_ms = [objective.budget_ms for objective in objectives]
    lookup, static = policies[:2]
    space = engine.model.knob_space
    accuracy = exhaustive_sweep(engine, train)
    feasible = feasible_table(build_requests(engine, train, objectives, pacing))
    assert isinstance(lookup, LookupTable)
    assert isinstance(static, FixedPolicy)
    assert set(budgets_ms) < set(lookup.budgets_ms)
    assert lookup.budgets_ms[0] < 0.6 * budgets_ms[0] < 1.4 * budgets_ms[-1] < lookup.budgets_ms[-1]
    expected = LookupTable.fit(space, budgets_ms, accuracy, feasible)
    for budget_ms in budgets_ms:
        assert np.array_equal(lookup.order_for(budget_ms), expected.order_for(budget_ms))
    assert static.knobs == FixedPolicy.fit(space, budgets_ms, accuracy, feasible).knobs


def evaluate_with(monkeypatch: pytest.MonkeyPatch, run: Any, engine: RolloutEngine, *args: Any) -> Evaluation:
    """Evaluate without the oracle, every timed request going through `run`."""
    monkeypatch.setattr(timed, "run_request", run)
    config = dataclasses.replace(CONFIG, oracle=False, num_warmup=2)
    return evaluate(engine.model, engine, *args, config, full_ms=FULL_MS)


def test_policies_answer_the_same_requests_in_one_random_but_repeatable_order(
    monkeypatch: pytest.MonkeyPatch,
    engine: RolloutEngine,
    train: list[Example],
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
) -> None:
    policies = fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS)
    orders: list[list[tuple[str, tuple[float, str]]]] = []

    def run(model: Any, policy: Any, image: Any, question: str, objective: Objective, *rest: Any, **named: Any) -> Any:
        orders[-1].append((policy.name, (objective.budget_ms, named["example_id"])))
        return run_request(model, policy, image, question, objective, *rest, **named)

    for _ in range(2):
        orders.append([])
        evaluate_with(monkeypatch, run, engine, policies, test, objectives, pacing)
    assert orders[0] == orders[1]
    requests = orders[0][2:]  # behind the warm-up
    rounds = [requests[start : start + len(policies)] for start in range(0, len(requests), len(policies))]
    for entries in rounds:
        assert {name for name, _ in entries} == {policy.name for policy in policies}
        assert len({asked for _, asked in entries}) == 1
    asked = [entries[0][1] for entries in rounds]
    assert len(set(asked)) == len(asked) == len(FRACTIONS) * CONFIG.num_timed
    for column in ([budget for budget, _ in asked], [entries[0][0] for entries in rounds]):
        num_changes = sum(a != b for a, b in itertools.pairwise(column))
        assert num_changes > len(rounds) / 3  # sorted there would be a few changes only


def test_bounds_follow_the_machine_and_are_the_same_for_every_policy(
    monkeypatch: pytest.MonkeyPatch,
    engine: RolloutEngine,
    train: list[Example],
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
    controller: ControllerPolicy,
) -> None:
    policies = [controller, *fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS)]
    slowdown = iter(np.geomspace(1.2, 3.0, 1000).tolist())

    def run(model: Any, policy: Any, image: Any, question: str, objective: Objective, pacing: Any, **named: Any) -> Any:
        drift = named.pop("drift")
        profiled = Objective(objective.budget_ms / drift.factor, objective.kind)
        paced = run_request(model, policy, image, question, profiled, pacing, **named)
        drift.observe(1.0, next(slowdown))
        return paced

    monkeypatch.setattr(timed, "run_request", run)
    config = dataclasses.replace(CONFIG, num_warmup=4, track_drift=True)
    evaluation = evaluate(engine.model, engine, policies, test, objectives, pacing, config, full_ms=FULL_MS)
    factors = np.full((len(FRACTIONS), len(test)), np.nan)
    was_timed = np.zeros(factors.shape, dtype=bool)
    places = {example.example_id: i for i, example in enumerate(test)}
    for record in evaluation.records:
        place = FRACTIONS.index(record.fraction), places[record.example_id]
        factor = record.metadata["drift_factor"]
        assert np.isnan(factors[place]) or factors[place] == factor
        factors[place] = factor
        was_timed[place] = record.latency_ms is not None
        assert "timed_knobs" not in record.metadata
    assert len(set(factors[was_timed])) == was_timed.sum()  # one round, one factor
    assert factors.min() > 1.2
    for row, timed_row in zip(factors, was_timed, strict=True):
        assert set(row[~timed_row]) <= set(row[timed_row])
    requests = build_requests(engine, test, objectives, pacing, factors)
    for record in evaluation.records:
        request = requests[FRACTIONS.index(record.fraction)][places[record.example_id]]
        assert request.budget_ms == record.budget_ms / record.metadata["drift_factor"]
        assert record.feasible == request.any_feasible
        if record.policy != "full":
            assert request.feasible.reshape(-1)[engine.model.knob_space.index(record.knobs)]
    uncorrected = build_requests(engine, test, objectives, pacing)
    assert feasible_table(requests).sum() < feasible_table(uncorrected).sum()


def test_a_timed_request_that_scores_otherwise_is_counted_and_named(
    monkeypatch: pytest.MonkeyPatch,
    engine: RolloutEngine,
    train: list[Example],
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
) -> None:
    policies = fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS)[2:3]

    def run(*args: Any, **named: Any) -> Any:
        paced = run_request(*args, **named)
        return dataclasses.replace(paced, answer="nonsense 99")

    evaluation = evaluate_with(monkeypatch, run, engine, policies, test, objectives, pacing)
    changed = [record for record in evaluation.records if record.metadata.get("timed_answer") == "nonsense 99"]
    assert len(changed) == evaluation.num_timed_requests
    assert evaluation.num_disagreements == sum(record.accuracy for record in changed)


def test_without_timing_there_are_no_latencies(
    engine: RolloutEngine, train: list[Example], test: list[Example], objectives: list[Objective], pacing: Pacing
) -> None:
    policies = fit_baselines(engine, train, objectives, pacing, full_ms=FULL_MS)
    config = dataclasses.replace(CONFIG, num_timed=0, oracle=False)
    evaluation = evaluate(engine.model, engine, policies, test, objectives, pacing, config, full_ms=FULL_MS)
    assert evaluation.num_timed_requests == 0
    assert all(record.latency_ms is None for record in evaluation.records)
    assert "oracle" not in {record.policy for record in evaluation.records}


def test_a_budget_may_cover_the_first_token_alone(
    engine: RolloutEngine,
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
    controller: ControllerPolicy,
) -> None:
    objectives = [Objective(objective.budget_ms, "ttft") for objective in objectives]
    config = dataclasses.replace(CONFIG, oracle=False)
    evaluation = evaluate(engine.model, engine, [controller], test, objectives, pacing, config, full_ms=FULL_MS)
    timed = [record for record in evaluation.records if record.latency_ms is not None]
    assert timed
    assert all(record.latency_ms == record.metadata["ttft_ms"] <= record.metadata["e2e_ms"] for record in timed)


def test_unusable_input_is_refused(
    engine: RolloutEngine,
    test: list[Example],
    objectives: list[Objective],
    pacing: Pacing,
    controller: ControllerPolicy,
) -> None:
    with pytest.raises(DataError, match="0 examples"):
        evaluate(engine.model, engine, [controller], [], objectives, pacing, CONFIG, full_ms=FULL_MS)
    with pytest.raises(DataError, match="2 objectives"):
        evaluate(engine.model, engine, [controller], test, objectives[:2], pacing, CONFIG, full_ms=FULL_MS)
    twin = dataclasses.replace(test[1], example_id=test[0].example_id)
    with pytest.raises(DataError, match="3 examples with 2 different ids"):
        evaluate(engine.model, engine, [controller], [*test[:2], twin], objectives, pacing, CONFIG, full_ms=FULL_MS)
    other = dataclasses.replace(
        pacing,
        guardrail=dataclasses.replace(
            pacing.guardrail, estimator=dataclasses.replace(pacing.guardrail.estimator, model_identity="another")
        ),
    )
    with pytest.raises(IdentityError):
        evaluate(engine.model, engine, [controller], test, objectives, other, CONFIG, full_ms=FULL_MS)


def test_a_metric_summarises_the_answers_of_every_policy_at_every_budget(
    evaluation: Evaluation, test: list[Example]
) -> None:
    summaries = summarise_answers(load_metric("f1"), evaluation.records, test)
    references = {example.example_id: example.references for example in test}
    assert set(summaries) == {record.policy for record in evaluation.records}
    for policy, by_fraction in summaries.items():
        assert set(by_fraction) == {f"{fraction:g}" for fraction in FRACTIONS}
        rows = [r for r in evaluation.records if (r.policy, r.fraction) == (policy, FRACTIONS[0])]
        scores = [load_metric("f1").score(r.metadata["answer"], references[r.example_id], ()) for r in rows]
        assert by_fraction[f"{FRACTIONS[0]:g}"]["f1"] == pytest.approx(np.mean(scores))
    assert summarise_answers(load_metric("anls"), evaluation.records, test) == {}


def test_a_mixture_is_summarised_by_benchmark(evaluation: Evaluation, test: list[Example]) -> None:
    names = {example.example_id: ("first", "second")[i % 2] for i, example in enumerate(test)}
    metrics = {"first": "f1", "second": "anls"}
    mixed = [
        dataclasses.replace(
            example,
            metadata=example.metadata | {"benchmark": names[example.example_id]},
            metric=metrics[names[example.example_id]],
        )
        for example in test
    ]
    summaries = summarise_answers(load_metric("exact_match"), evaluation.records, mixed)
    for policy, by_fraction in summaries.items():
        for fraction in FRACTIONS:
            numbers = by_fraction[f"{fraction:g}"]
            assert set(numbers) == {"first accuracy", "first exact_match", "first f1", "second accuracy"}
            rows = [r for r in evaluation.records if (r.policy, r.fraction) == (policy, fraction)]
            own = [row.accuracy for row in rows if names[row.example_id] == "second"]
            assert numbers["second accuracy"] == pytest.approx(np.mean(own))


def test_a_request_beyond_the_profile_is_kept_and_goes_on(
    tmp_path: Path, engine: RolloutEngine, test: list[Example], objectives: list[Objective], pacing: Pacing
) -> None:
    estimator = dataclasses.replace(pacing.guardrail.estimator, max_text_tokens=1)  # nothing is promised to anything
    guardrail = dataclasses.replace(pacing.guardrail, estimator=estimator)
    narrow = dataclasses.replace(pacing, guardrail=guardrail)
    path, policies = tmp_path / "partial.jsonl", [FullPolicy(engine.model.knob_space)]

    def run() -> dict[tuple[str, int, int], Answer]:
        return timed.time_requests(engine.model, policies, test, objectives, narrow, CONFIG, partial_path=path).runs

    first = run()
    assert all(answer.upper_bound_ms == math.inf and not answer.feasible for answer in first.values())
    assert run() == first  # what was kept, with nothing run again
