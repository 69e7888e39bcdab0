"""Cross-fitted predictors of accuracy: no question is judged by a model that was fitted on its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacevlm.baselines.ranking import BoolArray, IntArray
from pacevlm.errors import DataError
from pacevlm.evaluation.statistics import FloatArray
from pacevlm.knobs import KnobSpace

NUM_FOLDS = 5
KNOBS = ("tier", "top_k", "num_blocks")

# The two models, all their settings in one place. Wide inputs are cut to their leading principal components, or a few
# hundred questions would be learned by heart.
MODELS = ("linear", "trees")
MAX_COMPONENTS = 32
RIDGE_ALPHA = 100.0
TREES = {"max_iter": 100, "learning_rate": 0.1, "max_leaf_nodes": 31, "l2_regularization": 1.0, "early_stopping": False}
# A leaf holds rows of at least so many questions' worth: those of one question are nearly one observation.
MIN_LEAF_EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class SweptExamples:
    """Training examples that ran with every configuration, and what a policy may know of them.

    Attributes:
        space: the knob space, whose flat index all configurations follow.
        budgets_ms: strictly increasing, `(budgets,)`.
        accuracy: `(examples, configurations)`, without NaN.
        feasible: the guardrail's masks, `(budgets, examples, configurations)`; nothing feasible means the cheapest.
        predicted_ms: predicted latency, `(examples, configurations)`.
        features: what stage 1 sees apart from the budget, blocks `(examples, width)` by name.
        token_outputs: the latency token behind the first block at every tier, `(examples, tiers, width)`; None leaves
            the second predictor out.
        num_pixels: of each picture, `(examples,)`.
        pictures: which picture each example is about, `(examples,)`.
        example_ids: unique names, which fix an order, `(examples,)`.
        groups: labels of the traffic, by key, `(examples,)` each.
        moved_accuracy: as `accuracy`, of the same questions about the picture moved by a pixel; rows of NaN where that
            did not run.
    """

    space: KnobSpace
    budgets_ms: FloatArray
    accuracy: FloatArray
    feasible: BoolArray
    predicted_ms: FloatArray
    features: Mapping[str, FloatArray]
    token_outputs: FloatArray | None
    num_pixels: FloatArray
    pictures: NDArray[np.str_]
    example_ids: NDArray[np.str_]
    groups: Mapping[str, NDArray[np.str_]]
    moved_accuracy: FloatArray | None = None

    @property
    def configuration_places(self) -> IntArray:
        """Where each configuration stands on each knob, `(configurations, 3)`."""
        return np.array([self.space.place(knobs) for knobs in self.space])

    def ordered(self) -> SweptExamples:
        """The same examples ordered by picture and name, so that no result depends on how they came."""
        order = np.lexsort((self.example_ids, self.pictures))
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("features", "groups"):
            values[name] = {key: column[order] for key, column in values[name].items()}
        for name in ("accuracy", "predicted_ms", "token_outputs", "num_pixels", "pictures", "example_ids"):
            values[name] = None if values[name] is None else values[name][order]
        if self.moved_accuracy is not None:
            values["moved_accuracy"] = self.moved_accuracy[order]
        return SweptExamples(**{**values, "feasible": self.feasible[:, order]})


def picture_folds(pictures: NDArray[np.str_], seed: int = 0) -> IntArray:
    """The fold of every example, `(examples,)`, one for all examples of a picture; folds hold equally many pictures.

    Raises:
        DataError: there are fewer pictures than folds.
    """
    names, places = np.unique(pictures, return_inverse=True)
    if len(names) < NUM_FOLDS:
        raise DataError(f"{len(names)} different pictures given; headroom needs at least {NUM_FOLDS}, so give more")
    return np.asarray((np.random.default_rng(seed).permutation(len(names)) % NUM_FOLDS)[places], dtype=np.int64)


def predict_accuracy(
    swept: SweptExamples,
    folds: IntArray,
    model: str,
    *,
    with_token: bool = False,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> FloatArray:
    """Predicted accuracy of every example with every configuration, by fits on other folds' pictures.

    `linear` is one ridge regression for each configuration, so that every feature may matter otherwise to each;
    `trees` are gradient-boosted regression trees (histogram-based, as LightGBM) on features and knobs. Both are fitted
    to accuracies from 0 to 1, which need not be whole.

    Args:
        model: one of `MODELS`.
        with_token: whether it also reads the latency token's output at the configuration's tier.
        progress: called after every fit.

    Returns:
        `(examples, configurations)`.
    """
    shape = swept.space.shape[0], swept.space.num_stage2
    predicted = np.empty((len(swept.accuracy), *shape))
    for fold in range(NUM_FOLDS):
        train = folds != fold
        inputs = _inputs(swept, train, with_token)
        accuracy = swept.accuracy[train].reshape(-1, *shape)
        fit = _fit_linear if model == "linear" else _fit_trees
        predicted[~train] = fit(swept, inputs[train], accuracy, inputs[~train], seed)
        if progress is not None:
            progress()
    return predicted.reshape(len(predicted), -1)


def _inputs(swept: SweptExamples, train: BoolArray, with_token: bool) -> FloatArray:
    """Standardised features, `(examples, tiers, features)`; centres, spreads and components are the training part's."""
    from sklearn.decomposition import PCA

    num_examples, num_tiers = len(train), swept.space.shape[0]
    blocks = [block[:, None] for block in swept.features.values()]
    if with_token and swept.token_outputs is not None:
        blocks.append(swept.token_outputs)
    made = []
    for block in blocks:
        width = block.shape[2]
        known = block[train].reshape(-1, width).astype(np.float64)
        spread = known.std(axis=0)
        centre, spread = known.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)
        rows = (block.reshape(-1, width) - centre) / spread
        if width > MAX_COMPONENTS:
            pca = PCA(min(MAX_COMPONENTS, len(known) - 1), svd_solver="covariance_eigh").fit((known - centre) / spread)
            rows = pca.transform(rows) / np.sqrt(max(float(pca.explained_variance_.mean()), 1e-12))
        shape = (num_examples, num_tiers, rows.shape[1])
        made.append(np.broadcast_to(rows.reshape(num_examples, -1, rows.shape[1]), shape))
    return np.concatenate(made, axis=2)


def _fit_linear(
    swept: SweptExamples, inputs: FloatArray, accuracy: FloatArray, held_out: FloatArray, seed: int
) -> FloatArray:
    from sklearn.linear_model import Ridge

    tiers = range(accuracy.shape[1])
    models = [Ridge(alpha=RIDGE_ALPHA, solver="cholesky").fit(inputs[:, tier], accuracy[:, tier]) for tier in tiers]
    found = [model.predict(held_out[:, tier]).reshape(len(held_out), -1) for tier, model in enumerate(models)]
    return np.stack(found, axis=1)


def _fit_trees(
    swept: SweptExamples, inputs: FloatArray, accuracy: FloatArray, held_out: FloatArray, seed: int
) -> FloatArray:
    from sklearn.ensemble import HistGradientBoostingRegressor

    places = swept.configuration_places.reshape(*accuracy.shape[1:], len(KNOBS)).astype(np.float32)

    def rows(values: FloatArray) -> NDArray[np.float32]:
        shape = (*values.shape[:2], accuracy.shape[2])
        spread = np.broadcast_to(values.astype(np.float32)[:, :, None], (*shape, values.shape[2]))
        return np.concatenate([spread, np.broadcast_to(places, (*shape, len(KNOBS)))], axis=3).reshape(
            math.prod(shape), -1
        )

    least = MIN_LEAF_EXAMPLES * len(swept.space)
    model = HistGradientBoostingRegressor(**TREES, min_samples_leaf=least, random_state=seed)
    model.fit(rows(inputs), accuracy.reshape(-1))
    return np.asarray(model.predict(rows(held_out)), dtype=np.float64).reshape(len(held_out), *accuracy.shape[1:])
