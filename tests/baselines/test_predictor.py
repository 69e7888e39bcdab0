"""The predictor: ridge regressions that share what they learned among all budgets and prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pacevlm.baselines.predictor import RIDGE_ALPHA, PredictorPolicy, request_features
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError, IdentityError
from pacevlm.knobs import KnobSpace

NUM = 200


def ask(make_request: Callable[..., PolicyInput], question: np.ndarray, mask: object, **changes: float) -> PolicyInput:
    request = make_request(np.asarray(mask), **changes)
    view = dataclasses.replace(request.view, question_embedding=torch.from_numpy(question).float())
    return dataclasses.replace(
        request, view=view, bounds_ms=np.arange(1.0, 1.0 + request.feasible.size).reshape(request.feasible.shape)
    )


@pytest.fixture(scope="module")
def questions() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM, 4))


@pytest.fixture(scope="module")
def accuracy(space: KnobSpace, questions: np.ndarray) -> np.ndarray:
    """Questions whose first number is positive are answered by the dearest configuration alone, others by all."""
    right = np.ones((NUM, len(space)))
    right[questions[:, 0] > 0, :-1] = 0.0
    return right


@pytest.fixture
def requests(make_request: Callable[..., PolicyInput], space: KnobSpace, questions: np.ndarray) -> list[PolicyInput]:
    return [ask(make_request, question, np.ones(len(space))) for question in questions]


@pytest.fixture
def policy(space: KnobSpace, requests: list[PolicyInput], accuracy: np.ndarray) -> PredictorPolicy:
    return PredictorPolicy.fit(space, requests, accuracy)


def test_weights_are_those_of_a_ridge_regression(
    policy: PredictorPolicy, requests: list[PolicyInput], accuracy: np.ndarray
) -> None:
    from sklearn.linear_model import Ridge

    features = np.stack([request_features(request) for request in requests])
    spread = features.std(axis=0)
    rows = (features - features.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    expected = Ridge(alpha=RIDGE_ALPHA).fit(rows, accuracy).predict(rows)
    np.testing.assert_allclose([policy.predict(request) for request in requests], expected, atol=1e-9)


def test_it_spends_where_the_question_asks_for_it(
    policy: PredictorPolicy, make_request: Callable[..., PolicyInput], space: KnobSpace
) -> None:
    everything = np.ones(len(space))
    hard, easy = (np.array([number, 0.0, 0.0, 0.0]) for number in (2.0, -2.0))
    assert policy.choose(ask(make_request, hard, everything)) == space.full
    # With a price, an easy question gets no more than it needs, and a hard one what it is worth.
    assert policy.choose(ask(make_request, easy, everything, price=5.0)) == space.cheapest
    assert policy.choose(ask(make_request, hard, everything, price=5.0)) == space.full
    # Nothing is worth so much time.
    assert policy.choose(ask(make_request, hard, everything, price=1000.0)) == space.cheapest


def test_only_what_the_guardrail_admits_is_chosen(
    policy: PredictorPolicy, make_request: Callable[..., PolicyInput], space: KnobSpace, questions: np.ndarray
) -> None:
    rng = np.random.default_rng(1)
    for question in questions[:50]:
        mask = rng.random(len(space)) < 0.4
        request = ask(make_request, question, mask, price=float(rng.choice([0.0, 3.0, 50.0])))
        assert request.feasible.reshape(-1)[space.index(policy.choose(request))]


def test_it_is_read_as_it_was_written(
    policy: PredictorPolicy, requests: list[PolicyInput], space: KnobSpace, tmp_path: Path
) -> None:
    path = tmp_path / "predictor.json"
    policy.save(path)
    read = PredictorPolicy.load(path, space)
    for request in requests[:20]:
        np.testing.assert_array_equal(read.predict(request), policy.predict(request))
    with pytest.raises(IdentityError, match="accuracy predictor"):
        PredictorPolicy.load(path, KnobSpace())
    path.write_text(path.read_text().replace("spread", "spreads"))
    with pytest.raises(CheckpointError):
        PredictorPolicy.load(path, space)


def test_what_does_not_fit_together_is_refused(
    policy: PredictorPolicy, requests: list[PolicyInput], accuracy: np.ndarray, space: KnobSpace
) -> None:
    for wrong in (accuracy[:-1], accuracy[:, :-1], np.where(np.eye(*accuracy.shape) > 0, np.nan, accuracy)):
        with pytest.raises(DataError, match="a predictor needs every one of"):
            PredictorPolicy.fit(space, requests, wrong)
    with pytest.raises(DataError, match="cannot have shapes"):
        PredictorPolicy(space, policy.centre[:-1], policy.spread, policy.weights, policy.intercept)
