"""Timed requests: every policy answers the same ones alone, under bounds that follow the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pacevlm.config import EvaluateConfig
from pacevlm.controller.policy_interface import Policy
from pacevlm.latency.drift import DriftCorrection
from pacevlm.latency.measuring import without_garbage_collection
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.request import PacedResult, Pacing, run_with_policy
from pacevlm.types import Example

# Timed requests between two garbage collections.
WINDOW = 20


@dataclass(frozen=True)
class TimedRequests:
    """What the timed requests gave.

    Attributes:
        runs: by policy, place of the budget and place of the example.
        factors: what the guardrail's bounds were multiplied by for every example at every budget,
            `(budgets, examples)`; 1 where drift is not tracked.
    """

    runs: dict[tuple[str, int, int], PacedResult]
    factors: NDArray[np.float64]


def time_requests(
    model: ElasticModel,
    policies: Sequence[Policy],
    examples: Sequence[Example],
    budgets_ms: Sequence[float],
    pacing: Pacing,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> TimedRequests:
    """Let every policy answer a random part of the examples at every budget, each request alone.

    Examples and budgets come in rounds, in random order. In a round all policies answer the same request one after
    another, in random order, so that a machine that slows down slows down every policy alike. One correction of the
    guardrail's bounds follows the machine, as in a server: it is the same for all policies of a round, and learns from
    all their requests when the round is over. An example that is not timed at some budget gets the correction of a
    random round at that budget: it is judged under the bounds that this machine had.

    Args:
        examples: `config.num_timed` of them are timed.
        progress: called with (requests done, requests to do).
    """
    report = progress or (lambda *_: None)
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(len(examples))[: config.num_timed].tolist()
    rounds = list(itertools.product(range(len(budgets_ms)), drawn))
    rounds = [rounds[place] for place in rng.permutation(len(rounds))]
    drift = DriftCorrection.for_guardrail(pacing.guardrail, pacing.kind) if config.track_drift else None

    def run(policy: Policy, b: int, i: int) -> PacedResult:
        example, budget_ms = examples[i], budgets_ms[b]
        return run_with_policy(
            model, policy, example.source, example.question, budget_ms, pacing, example.example_id, drift=drift
        )

    model.capture_decode()
    requests = itertools.cycle(itertools.product(rounds, policies))
    for (b, i), policy in itertools.islice(requests, config.num_warmup if rounds else 0):
        run(policy, b, i)
    runs: dict[tuple[str, int, int], PacedResult] = {}
    factors = np.full((len(budgets_ms), len(examples)), np.nan)
    num_rounds = max(1, WINDOW // max(1, len(policies)))
    for start in range(0, len(rounds), num_rounds):
        with without_garbage_collection():
            for b, i in rounds[start : start + num_rounds]:
                order = [policies[place] for place in rng.permutation(len(policies))]
                with nullcontext(1.0) if drift is None else drift.held() as factors[b, i]:
                    for policy in order:
                        runs[policy.name, b, i] = run(policy, b, i)
        report(len(runs), len(rounds) * len(policies))
    for row in factors:
        known = row[~np.isnan(row)]
        row[np.isnan(row)] = rng.choice(known, len(row) - len(known)) if len(known) else 1.0
    return TimedRequests(runs, factors)
