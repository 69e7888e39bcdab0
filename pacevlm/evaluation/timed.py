"""Timed requests: every policy answers the same ones alone, under bounds that follow the machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacevlm.config import EvaluateConfig, config_from_dict, config_to_dict
from pacevlm.controller.policy_interface import Policy
from pacevlm.latency.drift import DriftCorrection
from pacevlm.latency.measuring import without_garbage_collection
from pacevlm.models.elastic import ElasticModel
from pacevlm.partial import PartialFile
from pacevlm.request.pacing import Pacing
from pacevlm.request.run import run_request
from pacevlm.types import Answer, Example, Objective

# Timed requests between two garbage collections.
WINDOW = 20


@dataclass(frozen=True)
class TimedRequests:
    """What the timed requests gave.

    Attributes:
        runs: by policy, place of the objective and place of the example.
        factors: what the guardrail's bounds were multiplied by for every example at every objective,
            `(objectives, examples)`; 1 where drift is not tracked.
    """

    runs: dict[tuple[str, int, int], Answer]
    factors: NDArray[np.float64]


def time_requests(
    model: ElasticModel,
    policies: Sequence[Policy],
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
    partial_path: Path | None = None,
) -> TimedRequests:
    """Let every policy answer a random part of the examples at every budget, each request alone.

    Examples and budgets come in rounds, in random order. In a round all policies answer the same request one after
    another, in random order, so that a machine that slows down slows down every policy alike. One correction of the
    guardrail's bounds follows the machine, as in a server: it is the same for all policies of a round, and learns from
    all their requests when the round is over. An example that is not timed at some budget gets the correction of a
    random round at that budget: it is judged under the bounds that this machine had.

    Args:
        examples: `config.num_timed` of them are timed.
        objectives: of one kind of budget.
        progress: called with (requests done, requests to do).
        partial_path: file to which every round is appended, and from which an interrupted evaluation of the same
            policies, examples and settings goes on: with what it measured, and with the correction as it was. The
            caller removes it once everything is written.

    Raises:
        DataError: that file is damaged.
        StorageError: a round could not be appended.
    """
    report = progress or (lambda *_: None)
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(len(examples))[: config.num_timed].tolist()
    rounds = list(itertools.product(range(len(objectives)), drawn))
    rounds = [rounds[place] for place in rng.permutation(len(rounds))]
    drift = DriftCorrection.for_guardrail(pacing.guardrail, objectives[0].kind) if config.track_drift else None

    def run(policy: Policy, b: int, i: int) -> Answer:
        source, question, name = examples[i].source, examples[i].question, examples[i].example_id
        return run_request(model, policy, source, question, objectives[b], pacing, example_id=name, drift=drift)

    partial = PartialFile(
        partial_path, describe_requests(model, policies, examples, objectives, pacing, config), "interrupted evaluation"
    )
    model.capture_graphs()
    requests = itertools.cycle(itertools.product(rounds, policies))
    num_warmup = config.num_warmup if len(partial.records) < len(rounds) else 0
    for (b, i), policy in itertools.islice(requests, num_warmup):
        run(policy, b, i)
    runs: dict[tuple[str, int, int], Answer] = {}
    factors = np.full((len(objectives), len(examples)), np.nan)
    orders = [[policies[place] for place in rng.permutation(len(policies))] for _ in rounds]
    for (b, i), (factor, after, earlier) in zip(
        rounds, partial.read(lambda record: _restore(record, pacing)), strict=False
    ):
        factors[b, i], drift = factor, after
        runs |= {(name, b, i): answer for name, answer in earlier.items()}
    num_rounds = max(1, WINDOW // max(1, len(policies)))
    for start in range(len(partial.records), len(rounds), num_rounds):
        with without_garbage_collection():
            for place in range(start, min(start + num_rounds, len(rounds))):
                b, i = rounds[place]
                with nullcontext(1.0) if drift is None else drift.held() as factors[b, i]:
                    answers = {policy.name: run(policy, b, i) for policy in orders[place]}
                runs |= {(name, b, i): answer for name, answer in answers.items()}
                partial.append(
                    {
                        "factor": float(factors[b, i]),
                        "drift": None if drift is None else drift.to_dict(),
                        "runs": {name: _finite(answer) for name, answer in answers.items()},
                    }
                )
        report(len(runs), len(rounds) * len(policies))
    for row in factors:
        known = row[~np.isnan(row)]
        row[np.isnan(row)] = rng.choice(known, len(row) - len(known)) if len(known) else 1.0
    return TimedRequests(runs, factors)


def describe_requests(
    model: ElasticModel,
    policies: Sequence[Policy],
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """What timed requests, and choices under the same bounds, depend on; ready for JSON."""
    return {
        "model_identity": model.identity,
        "pacing": pacing.identity,
        "policies": [policy.name for policy in policies],
        "examples": [[example.example_id, example.content_id] for example in examples],
        "objectives": [config_to_dict(objective) for objective in objectives],
        "settings": config_to_dict(config),
    }


def _finite(answer: Answer) -> dict[str, Any]:
    """An answer ready for JSON, which has no infinite numbers: what is infinite is so by default, and left out."""
    return {name: value for name, value in config_to_dict(answer).items() if value != math.inf}


def _restore(record: dict[str, Any], pacing: Pacing) -> tuple[float, DriftCorrection | None, dict[str, Answer]]:
    """What a round left: its factor, the correction after it, and its requests by policy."""
    drift = None if record["drift"] is None else DriftCorrection.from_dict(record["drift"])
    runs = {name: config_from_dict(Answer, answer) for name, answer in record["runs"].items()}
    if drift is not None:
        drift.check_guardrail(pacing.guardrail, drift.kind)
    return float(record["factor"]), drift, runs
