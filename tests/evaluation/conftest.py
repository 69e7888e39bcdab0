"""A constructed evaluation: synthetic accuracies and latencies, but every choice made by the real policies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.oracle import OraclePolicy
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.baselines.random_feasible import RandomFeasiblePolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.evaluation.fronts import Front, summarise_fronts
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.evaluation.summary import RunFacts, build_results
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.types import Objective, RequestSizes, RequestView, VisionSizes

FRACTIONS = (0.5, 0.65, 0.8, 1.0)
FULL_LATENCY_MS = 100.0


class _Reader(OneChoicePolicy):
    """A stand-in for a learned controller: it reads the image's size, which the table of accuracies depends on."""

    name = "controller"

    def choose(self, request: PolicyInput) -> Knobs:
        assert request.view.image_size is not None
        wanted = [0, 2][request.view.image_size[0] > 500]
        tiers = self.feasible(request).reshape(self.space.shape).any(axis=(1, 2)).nonzero()[0]
        tier = tiers[np.abs(tiers - wanted).argmin()]
        pairs = np.flatnonzero(request.feasible[tier].ravel())
        return Knobs(self.space.tiers[tier], *self.space.compute(int(pairs[-1])))


def _world(space: KnobSpace, num_examples: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    tier, top_k, blocks = (
        np.array(values)
        for values in zip(*[(space.tiers.index(k.tier), k.top_k, k.num_blocks) for k in space], strict=True)
    )
    size = generator.uniform(0.1, 1.0, num_examples)[:, None]
    difficulty = generator.normal(0.6, 1.0, num_examples)[:, None]
    need = np.where(size > 0.5, 0.9, -0.5)
    score = difficulty + need * (tier - 1) + 0.1 * (top_k - 8) + 0.35 * (blocks - 16)
    accuracy = (generator.uniform(size=(num_examples, 1)) < 1 / (1 + np.exp(-score))).astype(float)
    latency_ms = 8 + (tier + 1) * 13 * (0.4 + size) + blocks * (0.7 + 0.2 * top_k)
    return {"size": size[:, 0], "accuracy": accuracy, "latency_ms": latency_ms}


def make_records(num_examples: int, num_timed: int, seed: int = 0) -> list[EvaluationRecord]:
    space = KnobSpace()
    budgets_ms = [fraction * FULL_LATENCY_MS for fraction in FRACTIONS]
    train, test = _world(space, 300, seed), _world(space, num_examples, seed + 1)
    masks = np.stack([train["latency_ms"] * 1.05 <= budget_ms for budget_ms in budgets_ms])
    ids = [f"example-{i:04d}" for i in range(num_examples)]
    swept = [_request(space, train, i, budgets_ms[-1], str(i)) for i in range(300)]
    policies: list[OneChoicePolicy] = [
        _Reader(space),
        PredictorPolicy.fit(space, swept, train["accuracy"]),
        LookupTable.fit(space, budgets_ms, train["accuracy"], masks),
        FixedPolicy.fit(space, budgets_ms, train["accuracy"], masks),
        FullPolicy(space),
        CheapestPolicy(space),
        RandomFeasiblePolicy(space, seed),
        OraclePolicy(
            space,
            dict(zip(ids, test["accuracy"], strict=True)),
            dict(zip(ids, test["latency_ms"], strict=True)),
            FULL_LATENCY_MS,
        ),
    ]
    generator = np.random.default_rng(seed + 2)
    records = []
    for fraction, budget_ms in zip(FRACTIONS, budgets_ms, strict=True):
        for i, example_id in enumerate(ids):
            request = _request(space, test, i, budget_ms, example_id)
            side = int(1000 * test["size"][i])
            for policy in policies:
                tier = policy.choose_tier(request)
                knobs = Knobs(tier, *policy.choose_compute(request, tier, policy.latency_token(request)))
                predicted_ms = float(test["latency_ms"][i, space.index(knobs)])
                records.append(
                    EvaluationRecord(
                        policy=policy.name,
                        fraction=fraction,
                        budget_ms=budget_ms,
                        example_id=example_id,
                        knobs=knobs,
                        accuracy=float(test["accuracy"][i, space.index(knobs)]),
                        latency_ms=predicted_ms * float(generator.lognormal(0, 0.03)) if i < num_timed else None,
                        predicted_latency_ms=predicted_ms,
                        feasible=request.any_feasible,
                        family="count",
                        metadata={"side": side},
                    )
                )
    return records


def _request(space: KnobSpace, world: dict[str, np.ndarray], i: int, budget_ms: float, example_id: str) -> PolicyInput:
    mask = world["latency_ms"][i] * 1.05 <= budget_ms
    any_feasible = bool(mask.any())
    mask[0] |= not any_feasible
    side = int(1000 * world["size"][i])
    return PolicyInput(
        view=RequestView(torch.zeros(4), RequestSizes((VisionSizes(1, 144),) * 3, 12, side * side), (side, side), None),
        objective=Objective(budget_ms),
        bounds_ms=world["latency_ms"][i].reshape(space.shape) * 1.05,
        feasible=mask.reshape(space.shape),
        any_feasible=any_feasible,
        example_id=example_id,
    )


FACTS = RunFacts(
    commit="0123abc",
    device="a test device",
    model="tiny",
    dataset_name="digits",
    dataset_split="test",
    dtype="float32",
    versions={"numpy": np.__version__},
    seeds={"bootstrap": 0},
)


@pytest.fixture(scope="session")
def records() -> list[EvaluationRecord]:
    return make_records(num_examples=200, num_timed=60)


@pytest.fixture(scope="session")
def facts() -> RunFacts:
    return FACTS


def make_fronts(num_examples: int = 200) -> dict[str, Any]:
    """Three policies that answer alike, at latencies a factor apart."""
    place = np.arange(num_examples) / num_examples
    accuracy = np.stack([place >= 0.1 + lost for lost in (0.0, 0.03, 0.07, 0.2)]).astype(float)
    latency_ms = np.outer((1.0, 0.8, 0.6, 0.3), np.linspace(60.0, 90.0, num_examples))
    fronts = {
        name: Front(accuracy, slower * latency_ms)
        for name, slower in (("controller", 1.0), ("lookup_table", 1.25), ("fixed", 1.5))
    }
    measured_ms = {"controller": [[10.0, 30.0], [8.0, 24.0]]}
    return summarise_fronts(
        fronts, accuracy[0], (0.0, 4.0, 16.0, 64.0), budget_ms=150.0, default_price=4.0, measured_ms=measured_ms
    )


@pytest.fixture(scope="session")
def results(records: list[EvaluationRecord]) -> dict[str, Any]:
    return build_results(records, FACTS, fronts=make_fronts(), num_resamples=1000)


@pytest.fixture(scope="session")
def records_factory() -> Callable[..., list[EvaluationRecord]]:
    return make_records
