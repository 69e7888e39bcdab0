"""The predictor: ridge regressions that share what they learned among all budgets and prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pacevlm.baselines.predictor import RIDGE_ALPHAS, PredictorPolicy, request_features
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


def test_each_component_is_the_ridge_regression_that_leaving_one_out_likes_best(
    make_request: Callable[..., PolicyInput], space: KnobSpace
) -> None:
    """Against scikit-learn's closed form, on outcomes of which some can be told and some are noise."""
    from sklearn.linear_model import RidgeCV

    rng = np.random.default_rng(3)
    questions = rng.normal(size=(NUM, 4))
    told = questions @ rng.normal(size=(4, 2)) @ rng.normal(size=(2, len(space)))
    accuracy = told + rng.normal(size=(NUM, len(space)))
    requests = [ask(make_request, question, np.ones(len(space))) for question in questions]
    features = np.stack([request_features(request) for request in requests])
    spread = features.std(axis=0)
    rows = (features - features.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    mean = accuracy.mean(axis=0)
    components = np.linalg.svd(accuracy - mean, full_matrices=False)[2]
    ridge = RidgeCV(RIDGE_ALPHAS, alpha_per_target=True).fit(rows, (accuracy - mean) @ components.T)
    assert len(set(ridge.alpha_)) > 1
    policy = PredictorPolicy.fit(space, requests, accuracy)
    expected = ridge.predict(rows) @ components + mean
    np.testing.assert_allclose([policy.predict(request) for request in requests], expected, atol=1e-8)


def test_doubt_is_about_the_error_of_predicted_differences(
    make_request: Callable[..., PolicyInput], space: KnobSpace
) -> None:
    """Over many drawings of the same questions' answers; that components are drawn as well is not counted."""
    rng = np.random.default_rng(4)
    questions = rng.normal(size=(NUM, 4))
    requests = [ask(make_request, question, np.ones(len(space))) for question in questions]
    # The last configuration is the best by far, so that every drawing compares with it.
    truth = questions @ rng.normal(size=(4, len(space))) + np.arange(len(space)) * 3.0
    differences, doubts = [], []
    for _ in range(40):
        policy = PredictorPolicy.fit(space, requests, truth + rng.normal(size=truth.shape))
        predicted = np.stack([policy.predict(request) for request in requests])
        differences.append(predicted - predicted[:, -1:])
        doubts.append(policy.doubt)
    spread = np.sqrt(np.var(differences, axis=0, ddof=1).mean(axis=0))
    assert policy.doubt[-1] == 0
    ratios = np.mean(doubts, axis=0)[:-1] / spread[:-1]
    assert ((ratios > 0.5) & (ratios < 1.1)).all()


def test_what_is_best_on_average_is_left_only_where_the_gain_is_clear(
    make_request: Callable[..., PolicyInput], space: KnobSpace
) -> None:
    """Where answers have nothing to do with the question, one configuration runs wherever it is admitted."""
    rng = np.random.default_rng(5)
    accuracy = (rng.random((NUM, len(space))) < 0.8).astype(np.float64)
    accuracy[:, -1] = rng.random(NUM) < 0.9
    requests = [ask(make_request, question, np.ones(len(space))) for question in rng.normal(size=(NUM, 4))]
    policy = PredictorPolicy.fit(space, requests, accuracy)
    chosen = [policy.choose(request) for request in requests]
    assert np.mean([knobs == space.full for knobs in chosen]) > 0.95


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
        PredictorPolicy(space, policy.centre[:-1], policy.spread, policy.weights, policy.intercept, policy.doubt)
