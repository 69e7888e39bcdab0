"""An upper bound on how many tokens an answer will take, known before anything is generated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from pacevlm.artefact import content_sha256, load_artefact, save_artefact, typed
from pacevlm.errors import ProfileError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.latency.conformal import check_alpha, conformal_quantile, min_num_scores

OUTPUT_LENGTH_SCHEMA_VERSION = 2
# Far more than any answer has, and than a token count can depend on a number of an embedding.
MAX_NEW_TOKENS, MAX_WEIGHT = 10**6, 1e12
# Directions of the embedding whose spread is this small against the largest are rounding, not questions.
MIN_RELATIVE_SPREAD = 1e-6
# With fewer examples per coefficient a quantile regression follows single examples.
MIN_EXAMPLES_PER_COEFFICIENT = 10

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OutputLengthModel:
    """Calibrated upper quantile of the number of output tokens, linear in what is known of the question.

    Attributes:
        model_identity: names the weights that the question embeddings and the answers come from.
        weights: shape `(d,)`, tokens per unit of the pooled question embedding.
        text_weight: output tokens per text token of the prompt; None if the model was fitted without text lengths.
        correction: whole tokens that the conformal step adds; may be negative.

    Raises:
        ProfileError: a value is out of range or not finite.
    """

    model_identity: str
    weights: tuple[float, ...]
    text_weight: float | None
    bias: float
    correction: int
    max_new_tokens: int
    alpha: float
    _weights: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model_identity, str) or not self.model_identity:
            raise ProfileError(f"model_identity is {self.model_identity!r}; it must be text that names the weights")
        _check_max_new_tokens(self.max_new_tokens)
        numbers = (*self.weights, self.bias, self.text_weight or 0.0)
        if not self.weights or not all(abs(number) <= MAX_WEIGHT for number in numbers):
            raise ProfileError(
                f"an output length model needs one or more weights, and only finite numbers within ±{MAX_WEIGHT:g}"
            )
        correction = self.correction
        if isinstance(correction, bool) or not isinstance(correction, int) or abs(correction) > self.max_new_tokens:
            raise ProfileError(
                f"correction is {correction!r}; it must be a whole number within ±max_new_tokens, {self.max_new_tokens}"
            )
        check_alpha(self.alpha)
        object.__setattr__(self, "_weights", np.array(self.weights))

    @classmethod
    def fit(
        cls,
        embeddings: ArrayLike,
        lengths: ArrayLike,
        max_new_tokens: int,
        alpha: float,
        *,
        model_identity: str,
        num_text_tokens: ArrayLike | None = None,
        num_components: int = 8,
        seed: int = 0,
    ) -> OutputLengthModel:
        """Fit a linear quantile on one half of the examples and correct it on the other.

        The bound then holds for a new exchangeable question with probability at least 1 − alpha, however bad the
        linear model is; a bad one only makes the bound loose.

        Method: quantile regression (Koenker and Bassett, "Regression Quantiles", 1978) on principal components, then
        conformalised (Romano, Patterson and Candès, "Conformalized Quantile Regression", 2019, one-sided).

        Args:
            embeddings: pooled question embeddings, shape `(n, d)`.
            lengths: output tokens of each, whole numbers in `1..max_new_tokens`, shape `(n,)`.
            alpha: how often the answer may be longer than the bound.
            num_text_tokens: text tokens of each prompt, shape `(n,)`; if given here, they must be given to predict.
            num_components: principal components of the embedding to use at most.
            seed: decides which examples belong to which half.

        Raises:
            ConfigError: alpha does not lie strictly between 0 and 1.
            ProfileError: shapes disagree, a value is out of range, or there are too few examples for this alpha.
        """
        alpha = check_alpha(alpha)
        _check_max_new_tokens(max_new_tokens)
        if num_components < 0:
            raise ProfileError(f"num_components is {num_components}; it must be a whole number from 0")
        features, targets = np.asarray(embeddings, np.float64), np.asarray(lengths, np.float64)
        if features.ndim != 2 or not features.shape[1] or targets.shape != features.shape[:1]:
            raise ProfileError(
                f"embeddings of shape {features.shape} and lengths of shape {targets.shape} must be (n, d) and (n,)"
            )
        text = np.zeros(len(targets)) if num_text_tokens is None else np.asarray(num_text_tokens, np.float64)
        if text.shape != targets.shape or not (np.isfinite(features).all() and np.isfinite(text).all()):
            raise ProfileError("embeddings and num_text_tokens must be finite, one row and one number per length")
        if not ((targets >= 1) & (targets <= max_new_tokens) & (targets == np.floor(targets))).all():
            raise ProfileError(f"lengths must be whole numbers in 1..{max_new_tokens} (max_new_tokens)")
        needed = min_num_lengths(alpha)
        if len(targets) < needed:
            raise ProfileError(f"{len(targets)} examples are too few for alpha {alpha}; give at least {needed}")

        order = np.random.default_rng(seed).permutation(len(targets))
        # The odd example goes to the calibration half, which is the one that has a smallest allowed size.
        fitted, calibrated = order[: len(order) // 2], order[len(order) // 2 :]
        components = _principal_components(
            features[fitted], min(num_components, len(fitted) // MIN_EXAMPLES_PER_COEFFICIENT - 1)
        )
        center, text_center = features[fitted].mean(axis=0), float(text[fitted].mean())
        text_scale = float(text[fitted].std()) or 1.0
        design = np.column_stack(
            [
                np.ones(len(fitted)),
                *([] if num_text_tokens is None else [(text[fitted] - text_center) / text_scale]),
                (features[fitted] - center) @ components,
            ]
        )
        coefficients = _quantile_regression(design, targets[fitted], 1.0 - alpha)
        # Projection and regression are both linear: together they are one weight per embedding value.
        text_weight = None if num_text_tokens is None else float(coefficients[1]) / text_scale
        weights = components @ coefficients[1 if text_weight is None else 2 :]
        bias = float(coefficients[0] - center @ weights - (text_weight or 0.0) * text_center)

        model = cls(model_identity, tuple(weights.tolist()), text_weight, bias, 0, max_new_tokens, alpha)
        bounds = model.upper_many(features[calibrated], None if text_weight is None else text[calibrated])
        correction = conformal_quantile(targets[calibrated] - bounds, alpha)
        assert correction is not None  # the number of examples was checked above
        return cls(model_identity, model.weights, text_weight, bias, int(correction), max_new_tokens, alpha)

    def upper(self, embedding: ArrayLike, num_text_tokens: float | None = None) -> int:
        """Bound the output tokens of one question, in `1..max_new_tokens`.

        Args:
            embedding: pooled question embedding, shape `(d,)`.
            num_text_tokens: text tokens of the prompt, if and only if the model was fitted with them.

        Raises:
            ProfileError: the embedding has another size, a value is not finite, or the text length is missing or
                not wanted.
        """
        text = None if num_text_tokens is None else np.asarray([num_text_tokens], np.float64)
        return int(self.upper_many(np.asarray(embedding, np.float64)[None], text)[0])

    def upper_many(self, embeddings: ArrayLike, num_text_tokens: ArrayLike | None = None) -> NDArray[np.int64]:
        """Bound several questions at once, shapes `(n, d)` and `(n,)` to `(n,)`; raises as `upper` does."""
        features = np.asarray(embeddings, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.weights):
            raise ProfileError(f"question embeddings have shape {features.shape}; expected (n, {len(self.weights)})")
        if (num_text_tokens is None) != (self.text_weight is None):
            needs = "without" if self.text_weight is None else "with"
            raise ProfileError(f"this model was fitted {needs} text lengths; call it the same way")
        text = np.zeros(len(features)) if num_text_tokens is None else np.asarray(num_text_tokens, np.float64)
        if text.shape != (len(features),):
            raise ProfileError(f"{len(features)} questions need {len(features)} text lengths, not shape {text.shape}")
        if not (np.isfinite(features).all() and np.isfinite(text).all()):
            raise ProfileError("question embeddings and text lengths must be finite numbers")
        quantile = features @ self._weights + (self.text_weight or 0.0) * text + self.bias
        # Rounded and clipped before the correction too, so that correction and bound are whole numbers throughout.
        # 1e-6 keeps a regression that meets a whole number up to rounding from claiming one token more.
        rounded = np.clip(np.ceil(quantile - 1e-6), 1, self.max_new_tokens).astype(np.int64)
        return np.clip(rounded + self.correction, 1, self.max_new_tokens)

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "model_identity": self.model_identity,
            "weights": list(self.weights),
            "text_weight": self.text_weight,
            "bias": self.bias,
            "correction": self.correction,
            "max_new_tokens": self.max_new_tokens,
            "alpha": self.alpha,
        }

    @property
    def made_for(self) -> Identity:
        """The model whose answers it bounds."""
        return Identity(self.model_identity, max_new_tokens=self.max_new_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the bounds depend on."""
        return content_sha256(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the model as JSON; raises StorageError if that fails."""
        save_artefact(path, "output length model", OUTPUT_LENGTH_SCHEMA_VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, wanted: Identity = ANYTHING) -> OutputLengthModel:
        """Read a model and check what it was made for.

        Raises:
            ProfileError: the file is missing, corrupt or of another schema version.
            IdentityError: it was fitted for another model.
        """
        values = load_artefact(path, "output length model", OUTPUT_LENGTH_SCHEMA_VERSION)
        try:
            model: OutputLengthModel = typed(cls, values, "an output length model")
        except ProfileError as error:
            raise ProfileError(f"the output length model at {path} is corrupt: {error}; fit it anew") from error
        model.made_for.check(f"the output length model at {path}", wanted)
        return model


def _check_max_new_tokens(max_new_tokens: object) -> None:
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:  # type: ignore[operator]
        raise ProfileError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number in 1..{MAX_NEW_TOKENS}")


def _principal_components(features: Array, num_components: int) -> Array:
    """Leading principal directions scaled to unit variance, shape `(d, at most num_components)`."""
    _, spreads, directions = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    # Against the features' own size, so that equal embeddings have no direction instead of one made of rounding.
    smallest = MIN_RELATIVE_SPREAD * max(float(spreads[0]), float(np.linalg.norm(features)))
    count = min(num_components, int((spreads > smallest).sum()))
    return np.asarray((directions[:count] / (spreads[:count, None] / math.sqrt(len(features)))).T)


def _quantile_regression(design: Array, targets: Array, quantile: float) -> Array:
    """Coefficients that minimise the pinball loss, shape `(columns,)`.

    Solved as the dual linear program (Koenker, "Quantile Regression", 2005, section 6.2): one bounded variable per
    example and one equation per coefficient, so that thousands of examples take milliseconds; the coefficients are
    the equations' shadow prices.
    """
    solution = linprog(
        -targets,
        A_eq=csr_array(design.T),
        b_eq=(1.0 - quantile) * design.sum(axis=0),
        bounds=(0.0, 1.0),
        method="highs",
    )
    if solution.status != 0:
        raise ProfileError(f"the quantile regression of output lengths failed: {solution.message}")
    return -np.asarray(solution.eqlin.marginals, dtype=np.float64)


def min_num_lengths(alpha: float) -> int:
    """Fewest examples that a model of output lengths can be fitted to and corrected on, one half for each."""
    return 2 * max(min_num_scores(alpha), MIN_EXAMPLES_PER_COEFFICIENT)
