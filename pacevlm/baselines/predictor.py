"""A predictor of accuracy as a policy: what supervised learning makes of the same sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from pacevlm.artefact import Range
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.ranking import FloatArray
from pacevlm.baselines.stored import load_fitted, save_fitted
from pacevlm.controller.features import size_features, time_costs
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError
from pacevlm.knobs import Knobs, KnobSpace

KIND = "accuracy predictor"
# Penalties to choose from, of standardised features; under the last one nothing is learned.
RIDGE_ALPHAS = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, 1e12)
# A feature that varies less says nothing.
MIN_SPREAD = 1e-9


# Far beyond what a fit gives, and small enough for sums of products.
_Number = Annotated[float, Range(-1e6, 1e6)]


class _Stored(TypedDict):
    centre: list[_Number]
    spread: list[Annotated[float, Range(MIN_SPREAD, 1e6)]]
    weights: list[list[_Number]]
    intercept: list[_Number]
    doubt: list[Annotated[float, Range(0, 1e6)]]


class PredictorPolicy(OneChoicePolicy):
    """Wants the admitted configuration whose predicted accuracy, less what its time costs, is highest.

    A linear regression on what stage 1 sees: sizes and the question's mean embedding. It knows no budget, so all
    budgets and prices share what it learned; the guardrail's mask and the price do the rest. From a predicted accuracy
    goes one standard error of its difference to the configuration that is best on average, so that this one is left
    only where the gain is clear (the one-standard-error rule, Breiman et al. 1984, 3.4.3).

    Args:
        space: the knob space.
        centre, spread: of the features, `(features,)`.
        weights: `(features, configurations)`.
        intercept: mean accuracies, `(configurations,)`.
        doubt: those standard errors, of a usual request, `(configurations,)`.

    Raises:
        DataError: the shapes do not fit each other or the knob space.
    """

    name = "predictor"

    def __init__(
        self,
        space: KnobSpace,
        centre: FloatArray,
        spread: FloatArray,
        weights: FloatArray,
        intercept: FloatArray,
        doubt: FloatArray,
    ) -> None:
        super().__init__(space)
        self.centre, self.spread = np.asarray(centre, dtype=np.float64), np.asarray(spread, dtype=np.float64)
        self.weights, self.intercept = np.asarray(weights, dtype=np.float64), np.asarray(intercept, dtype=np.float64)
        self.doubt = np.asarray(doubt, dtype=np.float64)
        num_features = len(self.centre)
        shapes = (self.spread.shape, self.weights.shape, self.intercept.shape, self.doubt.shape)
        if shapes != ((num_features,), (num_features, len(space)), (len(space),), (len(space),)):
            raise DataError(
                f"a predictor of {num_features} features and {len(space)} configurations cannot have shapes {shapes}"
            )

    @classmethod
    def fit(cls, space: KnobSpace, requests: Sequence[PolicyInput], accuracy: FloatArray) -> Self:
        """Fit to swept training examples.

        Configurations answer alike, so the regression is of the principal components of their accuracies, each with a
        ridge penalty of its own, the one with the least squared error when every example is left out in turn (Allen
        1974). What configurations share is told from many examples; noise between two of them is not learned at all.

        Args:
            requests: one per example, at any budget.
            accuracy: `(examples, configurations)`, without NaN.

        Raises:
            DataError: an accuracy is missing, or shapes disagree.
        """
        accuracy = np.asarray(accuracy, dtype=np.float64)
        if accuracy.shape != (len(requests), len(space)) or not len(requests) or np.isnan(accuracy).any():
            raise DataError(
                f"accuracy has shape {accuracy.shape}; a predictor needs every one of {len(requests)} examples with "
                f"each of {len(space)} configurations"
            )
        features = np.stack([request_features(request) for request in requests])
        centre, spread = features.mean(axis=0), features.std(axis=0)
        spread = np.where(spread > MIN_SPREAD, spread, 1.0)
        intercept = accuracy.mean(axis=0)
        components = np.linalg.svd(accuracy - intercept, full_matrices=False)[2]
        weights, variance = _fit_ridges((features - centre) / spread, (accuracy - intercept) @ components.T)
        difference = components - components[:, [int(intercept.argmax())]]
        doubt = np.sqrt(variance @ difference**2)
        return cls(space, centre, spread, weights @ components, intercept, doubt)

    def predict(self, request: PolicyInput) -> NDArray[np.float64]:
        """Predicted accuracy of every configuration, `(configurations,)`."""
        features = (request_features(request) - self.centre) / self.spread
        return np.asarray(features @ self.weights + self.intercept)

    def choose(self, request: PolicyInput) -> Knobs:
        """The admitted configuration that is worth most; of equal ones the first of the space, the cheapest."""
        worth = self.predict(request) - self.doubt - time_costs(request).reshape(-1)
        return self.space[int(np.where(self.feasible(request), np.round(worth, 9), -np.inf).argmax())]

    def save(self, path: str | Path) -> None:
        """Write the predictor as JSON; raises StorageError."""
        names = ("centre", "spread", "weights", "intercept", "doubt")
        save_fitted(path, KIND, self.space, {name: getattr(self, name).tolist() for name in names})

    @classmethod
    def load(cls, path: str | Path, space: KnobSpace) -> Self:
        """Read a saved predictor; raises CheckpointError if malformed, IdentityError if of another knob space."""
        content = load_fitted(path, KIND, space, _Stored)
        try:
            return cls(space, **{name: np.array(values) for name, values in content.items()})
        except (DataError, ValueError) as error:
            raise CheckpointError(f"{path} is malformed: {error}; fit the policy again") from error


def _fit_ridges(rows: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One ridge regression per target, each with the penalty that predicts examples best that it was not fitted to.

    Args:
        rows: centred features, `(examples, features)`.
        targets: centred, `(examples, targets)`.

    Returns:
        Weights `(features, targets)`, and the variance of a prediction for a usual example, `(targets,)`.
    """
    left, singular, right = np.linalg.svd(rows, full_matrices=False)
    rotated = left.T @ targets
    best = np.full(targets.shape[1], np.inf)
    shrunk, variance = np.zeros_like(rotated), np.zeros_like(best)
    for alpha in RIDGE_ALPHAS:
        kept = singular**2 / (singular**2 + alpha)
        # Share of an example in its own prediction; the mean that is taken off beforehand has its part.
        own = np.minimum(left**2 @ kept + 1 / len(rows), 1 - MIN_SPREAD)
        error = (((targets - left @ (kept[:, None] * rotated)) / (1 - own)[:, None]) ** 2).mean(axis=0)
        better = error < best
        best = np.where(better, error, best)
        shrunk[:, better] = (singular / (singular**2 + alpha))[:, None] * rotated[:, better]
        variance[better] = error[better] * (1 + (kept**2).sum()) / len(rows)
    return right.T @ shrunk, variance


def request_features(request: PolicyInput) -> NDArray[np.float64]:
    """What stage 1 sees of a request apart from budget and mask, `(features,)`; raises ImageError without an image."""
    question = request.view.question_embedding.double().cpu().numpy()
    return np.concatenate([np.array(size_features(request)), question])
