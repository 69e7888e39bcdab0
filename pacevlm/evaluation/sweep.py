"""The sweep: every policy on the same examples and budgets, answers in batches, latencies one request at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.oracle import OraclePolicy
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.baselines.random_feasible import RandomFeasiblePolicy
from pacevlm.config import EvaluateConfig
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.data.metrics import Metric
from pacevlm.errors import DataError
from pacevlm.evaluation.fronts import Front
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.evaluation.timed import describe_requests, time_requests
from pacevlm.knobs import Knobs
from pacevlm.latency.measuring import use_num_threads
from pacevlm.models.elastic import ElasticModel
from pacevlm.partial import PartialFile
from pacevlm.request.pacing import Pacing, policy_inputs
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Answer, BudgetKind, Example, Objective, Outcome

# What is going on, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
# A lookup table is fitted at so many budgets besides those asked for, from half the lowest to 1.5 times the highest:
# bounds that follow the machine are as good as budgets in between.
NUM_TABLE_BUDGETS = 32
# What an unfinished evaluation leaves: timed requests, choices, and requests timed at prices.
PARTIAL_NAMES = ("evaluate.partial.jsonl", "choices.partial.jsonl", "prices.partial.jsonl")
# Examples that a policy chooses for at once, and whose choices are then kept.
CHUNK = 128


# Requests and choices ------------------------------------------------------------------------------------------------


def build_requests(
    engine: RolloutEngine,
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    factors: NDArray[np.float64] | None = None,
) -> list[list[PolicyInput]]:
    """What policies are told of every example at every objective: one list per objective, in the order of the examples.

    Args:
        objectives: of one kind of budget.
        factors: how many times slower than profiled the machine is, `(objectives, examples)`; budgets are divided by
            them, as `run_request` does. As profiled if None.

    Raises:
        ProfileError: the guardrail is not calibrated for this kind of budget, or does not fit the model.
    """
    views = [engine.view(example) for example in examples]
    if not views:
        return [[] for _ in objectives]
    bounds_ms = pacing.upper_bounds_ms(views, objectives[0].kind)
    slower = np.ones((len(objectives), len(views))) if factors is None else factors
    ids = [example.example_id for example in examples]
    requests = []
    for objective, row in zip(objectives, slower.tolist(), strict=True):
        profiled = [replace(objective, budget_ms=objective.budget_ms / factor) for factor in row]
        requests.append(policy_inputs(views, profiled, bounds_ms, ids))
    return requests


def feasible_table(requests: Sequence[Sequence[PolicyInput]]) -> NDArray[np.bool_]:
    """The guardrail's masks as fitting wants them, `(budgets, examples, configurations)`."""
    return np.array([[request.feasible.reshape(-1) for request in row] for row in requests])


@torch.no_grad()
def choose_knobs(
    policy: Policy, engine: RolloutEngine, examples: Sequence[Example], requests: Sequence[PolicyInput]
) -> list[Knobs]:
    """A policy's choice for every request, the latency tokens of all of them run together.

    Args:
        examples: one per request.
    """
    tiers = [policy.choose_tier(request) for request in requests]
    outputs: list[torch.Tensor | None] = [None] * len(requests)
    tokens = {o: policy.latency_token(request) for o, request in {r.objective: r for r in requests}.items()}
    given = [(i, token) for i, request in enumerate(requests) if (token := tokens[request.objective]) is not None]
    if given:
        places = [i for i, _ in given]
        together = engine.latency_token_outputs(
            [examples[i] for i in places], [tiers[i] for i in places], torch.stack([token for _, token in given])
        )
        for i, output in zip(places, together, strict=True):
            outputs[i] = output
    return [
        Knobs(tier, *policy.choose_compute(request, tier, output))
        for request, tier, output in zip(requests, tiers, outputs, strict=True)
    ]


def choose_all(
    policies: Sequence[Policy],
    engine: RolloutEngine,
    examples: Sequence[Example],
    requests: Sequence[Sequence[PolicyInput]],
    kept: PartialFile,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, int], list[Knobs]]:
    """Every policy's choices at every budget, by its name and the budget's place.

    Args:
        requests: one list per budget, one request per example.
        kept: choices that were made already; new ones are appended.
        progress: called with (policies at a budget done, to do).
    """
    cells = list(itertools.product(policies, range(len(requests))))
    chosen: dict[tuple[str, int], list[Knobs]] = {(policy.name, b): [] for policy, b in cells}
    for name, b, earlier in kept.read(lambda r: (r["policy"], r["budget"], [Knobs.parse(text) for text in r["knobs"]])):
        chosen[name, b] += earlier
    for number, (policy, b) in enumerate(cells, start=1):
        row = chosen[policy.name, b]
        while len(row) < len(examples):
            part = slice(len(row), len(row) + CHUNK)
            new = choose_knobs(policy, engine, examples[part], requests[b][part])
            kept.append({"policy": policy.name, "budget": b, "knobs": [str(knobs) for knobs in new]})
            row += new
        if progress is not None:
            progress(number, len(cells))
    return chosen


def exhaustive_sweep(
    engine: RolloutEngine, examples: Sequence[Example], progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float64]:
    """Accuracy of every example with every configuration, `(examples, configurations)`.

    The engine stores the answers, so that training on the same examples finds them.

    Args:
        progress: called with (rollouts done, rollouts to do).
    """
    configurations = list(engine.model.knob_space)
    outcomes = engine.run([(example, knobs) for example in examples for knobs in configurations], progress)
    return np.array([outcome.accuracy for outcome in outcomes]).reshape(len(examples), len(configurations))


def predict_sweep_ms(
    engine: RolloutEngine, examples: Sequence[Example], pacing: Pacing, kind: BudgetKind
) -> NDArray[np.float64]:
    """Predicted latency of swept examples with every configuration, `(examples, configurations)`, milliseconds.

    At the length of the full configuration's answer; which of two configurations is faster hardly depends on it.
    """
    full = engine.model.knob_space.full
    lengths = [outcome.num_output_tokens for outcome in engine.run([(example, full) for example in examples])]
    sizes = [engine.view(example).sizes for example in examples]
    return pacing.guardrail.estimator.predict_many(sizes, lengths, kind).reshape(len(examples), -1)


def fit_baselines(
    engine: RolloutEngine,
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    *,
    full_ms: float,
    prices: Sequence[float] = (0.0,),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Policy]:
    """Every policy that needs no controller: lookup table, fixed knobs and predictor as fitted, and the rest.

    Args:
        examples: of the training split; each runs with every configuration unless that is remembered.
        objectives: what is asked for, of one kind, with strictly increasing budgets; the lookup table knows others in
            between as well.
        pacing: the same that applies to every policy later.
        full_ms: the full latency that prices are for, milliseconds.
        prices: what the lookup table is fitted for, strictly increasing from 0.
        seed: of the random policy.
    """
    space = engine.model.knob_space
    accuracy = exhaustive_sweep(engine, examples, progress)
    budgets_ms, kind = [objective.budget_ms for objective in objectives], objectives[0].kind
    between_ms = np.geomspace(0.5 * budgets_ms[0], 1.5 * budgets_ms[-1], NUM_TABLE_BUDGETS)
    table_ms = sorted({*budgets_ms, *between_ms.tolist()})
    requests = build_requests(engine, examples, [Objective(ms, kind) for ms in table_ms], pacing)
    feasible = feasible_table(requests)
    asked_for = [table_ms.index(budget_ms) for budget_ms in budgets_ms]
    table = LookupTable.fit(
        space,
        table_ms,
        accuracy,
        feasible,
        prices=prices,
        latency=predict_sweep_ms(engine, examples, pacing, kind) / full_ms,
        num_pixels=[engine.view(example).sizes.num_pixels for example in examples],
    )
    return [
        table,
        FixedPolicy.fit(space, budgets_ms, accuracy, feasible[asked_for]),
        FullPolicy(space),
        CheapestPolicy(space),
        RandomFeasiblePolicy(space, seed),
        PredictorPolicy.fit(space, requests[0], accuracy),
    ]


def fit_fixed_front(
    engine: RolloutEngine,
    examples: Sequence[Example],
    objective: Objective,
    pacing: Pacing,
    *,
    full_ms: float,
    prices: Sequence[float],
) -> LookupTable:
    """The best fixed knobs for each price, whatever the picture, at one budget; fitted on swept training examples."""
    return LookupTable.fit(
        engine.model.knob_space,
        [objective.budget_ms],
        exhaustive_sweep(engine, examples),
        feasible_table(build_requests(engine, examples, [objective], pacing)),
        prices=prices,
        latency=predict_sweep_ms(engine, examples, pacing, objective.kind) / full_ms,
    )


def run_prices(
    policy: Policy,
    engine: RolloutEngine,
    examples: Sequence[Example],
    objective: Objective,
    prices: Sequence[float],
    pacing: Pacing,
    progress: Callable[[int, int], None] | None = None,
) -> Front:
    """What a policy's choices give on the same examples at every price, answered in batches; nothing is timed.

    Args:
        objective: with the budget of all requests, under the guardrail's bounds as they are.
        progress: called with (prices done, to do).
    """
    accuracy, latency_ms = np.empty((2, len(prices), len(examples)))
    objectives = [replace(objective, price=price) for price in prices]
    for i, row in enumerate(build_requests(engine, examples, objectives, pacing)):
        knobs = choose_knobs(policy, engine, examples, row)
        outcomes = engine.run(list(zip(examples, knobs, strict=True)))
        accuracy[i] = [outcome.accuracy for outcome in outcomes]
        latency_ms[i] = predict_ms(pacing, row, outcomes)
        if progress is not None:
            progress(i + 1, len(prices))
    return Front(accuracy, latency_ms)


def build_oracle(
    engine: RolloutEngine,
    examples: Sequence[Example],
    pacing: Pacing,
    kind: BudgetKind,
    full_ms: float,
    progress: Callable[[int, int], None] | None = None,
) -> OraclePolicy:
    """The oracle of these examples, from running each with every configuration."""
    accuracy = exhaustive_sweep(engine, examples, progress)
    predicted_ms = predict_sweep_ms(engine, examples, pacing, kind)
    ids = [example.example_id for example in examples]
    return OraclePolicy(
        engine.model.knob_space,
        dict(zip(ids, accuracy, strict=True)),
        dict(zip(ids, predicted_ms, strict=True)),
        full_ms,
    )


# The evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a sweep gave.

    Attributes:
        records: one per policy, budget and example.
        num_timed_requests: requests that ran alone, with a clock.
        num_disagreements: how many of them scored differently from the batched run of the same request; the model is
            the same, so anything but a rare rounding is a fault.
    """

    records: list[EvaluationRecord]
    num_timed_requests: int
    num_disagreements: int


def evaluate(
    model: ElasticModel,
    engine: RolloutEngine,
    policies: Sequence[Policy],
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    config: EvaluateConfig,
    *,
    full_ms: float,
    num_threads: int | None = None,
    progress: Progress | None = None,
    partial_dir: Path | None = None,
) -> Evaluation:
    """Run every policy on the same examples and budgets.

    Latency comes from a random part of the examples, each request alone; see `time_requests`. It includes everything
    that a request needs, the policy's own time as well. Accuracy comes from all examples, answered in batches, with
    the guardrail's bounds as they were corrected for drift while requests were timed.

    Args:
        policies: learned ones and baselines; `config.oracle` adds the oracle.
        objectives: one per fraction of `config.budgets`, of one kind of budget.
        pacing: the same for every policy.
        full_ms: the full latency that prices are for, milliseconds.
        num_threads: CPU threads of the timed requests; None leaves them.
        partial_dir: folder that keeps what an interrupted evaluation timed and chose, under `PARTIAL_NAMES`, for the
            next one with the same settings. The caller removes the files once everything is written.

    Raises:
        DataError: there are no examples, two share an id, or objectives and fractions differ in number.
        IdentityError: the pacing was made for another model.
    """
    pacing.made_for.check("the pacing", model.made_for)
    ids = {example.example_id for example in examples}
    if len(ids) != len(examples):
        raise DataError(f"{len(examples)} examples with {len(ids)} different ids given; records tell them apart by it")
    if not examples or len(objectives) != len(config.budgets):
        raise DataError(
            f"{len(examples)} examples and {len(objectives)} objectives for the fractions {config.budgets}; give at "
            "least one example and one objective per fraction"
        )
    examples = list(examples)
    report = progress or (lambda *_: None)
    competitors = list(policies)
    if config.oracle:
        counting = partial(report, "every configuration")
        competitors.append(build_oracle(engine, examples, pacing, objectives[0].kind, full_ms, counting))
    with use_num_threads(num_threads):
        timing = partial(report, "timed requests")
        timed = time_requests(
            model,
            competitors,
            examples,
            objectives,
            pacing,
            config,
            timing,
            partial_dir and partial_dir / PARTIAL_NAMES[0],
        )
    requests = build_requests(engine, examples, objectives, pacing, timed.factors)
    choices = PartialFile(
        partial_dir and partial_dir / PARTIAL_NAMES[1],
        {
            "factors": timed.factors.tolist(),
            **describe_requests(model, competitors, examples, objectives, pacing, config),
        },
        "interrupted evaluation",
    )
    chosen = choose_all(competitors, engine, examples, requests, choices, partial(report, "choices"))
    jobs = [(example, knobs) for row in chosen.values() for example, knobs in zip(examples, row, strict=True)]
    outcomes = iter(engine.run(jobs, partial(report, "answers")))
    records = []
    disagreements = 0
    for (policy_name, b), row in chosen.items():
        answered = [next(outcomes) for _ in row]
        predicted_ms = predict_ms(pacing, requests[b], answered)
        for i, (example, request, outcome) in enumerate(zip(examples, requests[b], answered, strict=True)):
            record = EvaluationRecord(
                policy=policy_name,
                fraction=config.budgets[b],
                budget_ms=objectives[b].budget_ms,
                example_id=example.example_id,
                knobs=outcome.knobs,
                accuracy=outcome.accuracy,
                latency_ms=None,
                predicted_latency_ms=float(predicted_ms[i]),
                feasible=request.any_feasible,
                family=str(example.metadata["family"]) if "family" in example.metadata else None,
                metadata={
                    **_kept_metadata(example),
                    "answer": outcome.answer,
                    "num_output_tokens": outcome.num_output_tokens,
                    "drift_factor": float(timed.factors[b, i]),
                },
            )
            run = timed.runs.get((policy_name, b, i))
            if run is not None:
                record = _add_latency(record, run)
                disagreements += engine.metric(run.answer, example) != outcome.accuracy
            records.append(record)
    return Evaluation(records, len(timed.runs), disagreements)


def summarise_answers(
    metric: Metric, records: Sequence[EvaluationRecord], examples: Sequence[Example]
) -> dict[str, dict[str, dict[str, float]]]:
    """Numbers of whole sets, for each policy and fraction.

    They are those that the metric has, if any; of a mixture those of each benchmark, with its name in front, and its
    accuracy.
    """
    by_id = {example.example_id: example for example in examples}
    benchmarks = {str(example.metadata.get("benchmark", "")) for example in examples}
    cells: dict[tuple[str, float, str], list[EvaluationRecord]] = {}
    for record in records:
        benchmark = str(by_id[record.example_id].metadata.get("benchmark", ""))
        cells.setdefault((record.policy, record.fraction, benchmark), []).append(record)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (policy, fraction, benchmark), rows in cells.items():
        own = [by_id[row.example_id] for row in rows]
        numbers = {} if len(benchmarks) == 1 else {"accuracy": float(np.mean([row.accuracy for row in rows]))}
        summary = metric.of(own[0]).summary
        if summary is not None:
            answers = [str(row.metadata["answer"]) for row in rows]
            numbers |= summary(answers, [example.references for example in own])
        prefix = f"{benchmark} " if len(benchmarks) > 1 else ""
        if numbers:
            cell = found.setdefault(policy, {}).setdefault(f"{fraction:g}", {})
            cell |= {f"{prefix}{name}": number for name, number in numbers.items()}
    return found


def predict_ms(pacing: Pacing, requests: Sequence[PolicyInput], outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
    """Predicted latency of every request with the knobs and the output length it had, `(requests,)`."""
    estimator = pacing.guardrail.estimator
    lengths = [outcome.num_output_tokens for outcome in outcomes]
    sizes = [request.view.sizes for request in requests]
    predicted_ms = estimator.predict_many(sizes, lengths, requests[0].objective.kind)
    indices = [estimator.knob_space.index(outcome.knobs) for outcome in outcomes]
    return predicted_ms.reshape(len(outcomes), -1)[np.arange(len(outcomes)), indices]


def _kept_metadata(example: Example) -> dict[str, Any]:
    """What an example says of itself, as far as JSON can hold it; the family has a place of its own."""
    return {
        name: value
        for name, value in example.metadata.items()
        if name != "family" and isinstance(value, (str, int, float, bool))
    }


def _add_latency(record: EvaluationRecord, timed: Answer) -> EvaluationRecord:
    """A record with its measured latency, and with what the timed run did otherwise than the batched one."""
    metadata = {**record.metadata, "e2e_ms": timed.times.e2e_ms, "ttft_ms": timed.times.ttft_ms}
    if timed.answer != record.metadata["answer"]:
        metadata["timed_answer"] = timed.answer
    if timed.knobs != record.knobs:
        metadata["timed_knobs"] = str(timed.knobs)
    return replace(record, latency_ms=timed.measured_ms, metadata=metadata)
