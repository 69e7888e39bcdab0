"""Output lengths stay below their bound as often as promised, and the bound follows the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.identity import Identity
from pacevlm.latency.output_length import OutputLengthModel, _quantile_regression

MAX_NEW_TOKENS = 32


def questions(
    rng: np.random.Generator, count: int, dimensions: int = 24
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Three kinds of question, whose answers take about 2, 5 and 14 tokens, some of them many more."""
    kind = rng.integers(3, size=count)
    directions = np.random.default_rng(99).standard_normal((3, dimensions))
    embeddings = 2.0 * directions[kind] + 0.5 * rng.standard_normal((count, dimensions))
    text = rng.integers(5, 60, size=count)
    lengths = 1 + rng.poisson(np.array([1.0, 4.0, 13.0])[kind] + 0.05 * text)
    return embeddings, text, np.minimum(lengths, MAX_NEW_TOKENS)


def fit(rng: np.random.Generator, count: int, alpha: float = 0.1) -> OutputLengthModel:
    embeddings, text, lengths = questions(rng, count)
    return OutputLengthModel.fit(
        embeddings, lengths, MAX_NEW_TOKENS, alpha, model_identity="weights-a", num_text_tokens=text
    )


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_coverage_on_new_questions(alpha: float) -> None:
    rng = np.random.default_rng(0)
    num_trials, num_new = 40, 250
    covered = 0
    for _ in range(num_trials):
        model = fit(rng, 200, alpha)
        embeddings, text, lengths = questions(rng, num_new)
        covered += int((lengths <= model.upper_many(embeddings, text)).sum())
    # Spread of the mean coverage: binomial over the new questions and Beta over the 100 calibration examples.
    variance = alpha * (1 - alpha) * (1 / (num_trials * num_new) + 1 / (num_trials * 101))
    assert covered / (num_trials * num_new) >= 1 - alpha - 3 * variance**0.5


def test_coverage_when_the_regression_overfits() -> None:
    # Embeddings that say nothing: the regression alone would cover about 85 % of new questions.
    rng = np.random.default_rng(8)
    num_trials, num_new, alpha = 60, 250, 0.1
    covered = uncorrected = 0
    for _ in range(num_trials):
        embeddings, lengths = rng.standard_normal((200 + num_new, 12)), rng.integers(1, 501, size=200 + num_new)
        model = OutputLengthModel.fit(embeddings[:200], lengths[:200], 600, alpha, model_identity="m")
        bounds = model.upper_many(embeddings[200:])
        covered += int((lengths[200:] <= bounds).sum())
        uncorrected += int((lengths[200:] <= bounds - model.correction).sum())
    slack = 3 * (alpha * (1 - alpha) * (1 / (num_trials * num_new) + 1 / (num_trials * 101))) ** 0.5
    assert covered / (num_trials * num_new) >= 1 - alpha - slack
    assert uncorrected / (num_trials * num_new) < 1 - alpha - slack


def test_bound_follows_the_question() -> None:
    rng = np.random.default_rng(1)
    model = fit(rng, 1500)
    embeddings, text, lengths = questions(rng, 2000)
    bounds = model.upper_many(embeddings, text)
    constant = int(np.quantile(lengths, 0.9, method="higher"))
    assert bounds.mean() < 0.75 * constant
    # Short answers are bounded well below what long ones need.
    assert np.median(bounds[lengths <= 3]) < 0.5 * np.median(bounds[lengths >= 14])


def test_bounds_are_whole_numbers_in_range_and_singles_equal_batches() -> None:
    rng = np.random.default_rng(2)
    model = fit(rng, 300)
    embeddings, text, _ = questions(rng, 50)
    bounds = model.upper_many(100 * embeddings, text)
    assert bounds.dtype == np.int64
    assert bounds.min() >= 1
    assert bounds.max() <= MAX_NEW_TOKENS
    assert len(set(bounds.tolist())) > 1
    singles = [model.upper(embedding, int(length)) for embedding, length in zip(embeddings, text, strict=True)]
    assert singles == model.upper_many(embeddings, text).tolist()


def test_a_smaller_alpha_never_lowers_the_coverage_of_the_calibration_examples() -> None:
    embeddings, _, lengths = questions(np.random.default_rng(3), 600)
    shares = []
    for alpha in (0.5, 0.3, 0.1, 0.02):
        model = OutputLengthModel.fit(embeddings, lengths, MAX_NEW_TOKENS, alpha, model_identity="m", num_components=0)
        assert len(set(model.upper_many(embeddings).tolist())) == 1  # no components: one bound for all
        shares.append(model.upper(embeddings[0]))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_equal_lengths_and_equal_embeddings_are_met_exactly() -> None:
    rng = np.random.default_rng(4)
    for embeddings in (np.full((60, 5), 0.1), rng.standard_normal((60, 5))):
        model = OutputLengthModel.fit(embeddings, np.full(60, 4), MAX_NEW_TOKENS, 0.1, model_identity="m")
        assert set(model.upper_many(embeddings).tolist()) == {4}


def test_quantile_regression_minimises_the_pinball_loss() -> None:
    rng = np.random.default_rng(5)
    design = np.column_stack([np.ones(200), rng.standard_normal((200, 3))])
    targets = design @ np.array([3.0, 1.0, -2.0, 0.0]) + rng.exponential(size=200)

    def loss(coefficients: NDArray[np.float64]) -> float:
        residuals = targets - design @ coefficients
        return float(np.maximum(0.9 * residuals, -0.1 * residuals).sum())

    best = _quantile_regression(design, targets, 0.9)
    for _ in range(300):
        assert loss(best) <= loss(best + 10.0 ** rng.uniform(-4, 0) * rng.standard_normal(4)) + 1e-9
    assert np.mean(targets <= design @ best + 1e-9) == pytest.approx(0.9, abs=0.03)


def test_round_trip(tmp_path: Path, reseal: Callable[[Path, Any], None]) -> None:
    rng = np.random.default_rng(6)
    model = fit(rng, 300)
    path = tmp_path / "length.json"
    model.save(path)
    loaded = OutputLengthModel.load(path, Identity("weights-a"))
    assert loaded == model
    embeddings, text, _ = questions(rng, 100)
    np.testing.assert_array_equal(loaded.upper_many(embeddings, text), model.upper_many(embeddings, text))
    with pytest.raises(IdentityError, match="weights-b"):
        OutputLengthModel.load(path, Identity("weights-b"))
    for change in (
        {"weights": []},
        {"weights": ["x"]},
        {"weights": [1e300]},
        {"bias": None},
        {"correction": MAX_NEW_TOKENS + 1},
        {"correction": 1.0},
        {"max_new_tokens": 10**9},
        {"alpha": 2},
        {"schema_version": 9},
        {"more": 1},
    ):
        reseal(path, {**json.loads(path.read_text()), **change})
        with pytest.raises(ProfileError):
            OutputLengthModel.load(path)
        model.save(path)


def test_bad_input_is_refused() -> None:
    embeddings, text, lengths = questions(np.random.default_rng(7), 100)

    def refit(**change: object) -> OutputLengthModel:
        arguments = {"embeddings": embeddings, "lengths": lengths, "max_new_tokens": MAX_NEW_TOKENS, "alpha": 0.1}
        return OutputLengthModel.fit(**{**arguments, "model_identity": "m", **change})  # type: ignore[arg-type]

    with pytest.raises(ConfigError):
        refit(alpha=0.0)
    for change, message in (
        ({"lengths": lengths[:-1]}, "shape"),
        ({"lengths": lengths * 0}, "whole numbers"),
        ({"lengths": lengths + 0.5}, "whole numbers"),
        ({"lengths": lengths + MAX_NEW_TOKENS}, "whole numbers"),
        ({"embeddings": embeddings * np.nan}, "finite"),
        ({"num_text_tokens": text[:-1]}, "finite, one row"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"alpha": 0.01}, "too few"),
        ({"model_identity": ""}, "model_identity"),
    ):
        with pytest.raises(ProfileError, match=message):
            refit(**change)
    model = refit()
    with pytest.raises(ProfileError, match="without text"):
        model.upper(embeddings[0], 5)
    with pytest.raises(ProfileError, match="with text"):
        refit(num_text_tokens=text).upper(embeddings[0])
    with pytest.raises(ProfileError, match="shape"):
        model.upper(embeddings[0, 1:])
    with pytest.raises(ProfileError, match="finite"):
        model.upper(embeddings[0] * np.inf)
