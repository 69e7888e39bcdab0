"""Headroom: what a controller could gain on given data, from the outcomes of a sweep and before any training.

Everything is cross-fitted by picture: tables and predictors judge no question about a picture that they were fitted on.
Intervals come from a bootstrap over pictures, with the fits as they are: they say how far other questions of the same
traffic might move a number, not how far other training questions might. So they are too narrow: of 60 made worlds of
300 questions in which nothing can be learned and two configurations tie, 80 % of the 95 % intervals of what is
learnable held 0 and 8 % lay above it. The estimate itself was right on average.

*Learnable* is what the better of two predictors of accuracy, used as a policy, gains over the lookup table. Both are
fixed beforehand, and one is chosen for all budgets by the cross-fitted accuracy that is reported too. That choice
among two is a little optimistic; what a controller trained on rewards reaches may be less, and with features that these
predictors cannot use, more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.ranking import BoolArray, IntArray, check_table
from pacevlm.errors import DataError
from pacevlm.evaluation.fronts import POINTS_BELOW, latency_at
from pacevlm.evaluation.held_out import KNOBS, MODELS, NUM_FOLDS, SweptExamples, picture_folds, predict_accuracy
from pacevlm.evaluation.statistics import FloatArray, percentile_interval, ratio_interval, resampled_means

Progress = Callable[[int, int], None]

NUM_RESAMPLES = 4000
# Fronts are made anew in every resample, which takes longer.
NUM_FRONT_RESAMPLES = 500
NUM_PRICES = 24
# A group of fewer pictures says nothing of the traffic.
MIN_GROUP_PICTURES = 20
SIZE_BINS = ("small", "medium", "large")


# Policies ------------------------------------------------------------------------------------------------------------


def size_bins(num_pixels: ArrayLike) -> NDArray[np.str_]:
    """Which third of the pictures' sizes each belongs to, `(examples,)`; equal sizes share a bin."""
    pixels = np.asarray(num_pixels, dtype=np.float64)
    places = np.searchsorted(np.quantile(pixels, [1 / 3, 2 / 3]), pixels, side="left")
    return np.asarray(np.array(SIZE_BINS)[places])


def best_choice(value: FloatArray, feasible: BoolArray, predicted_ms: FloatArray) -> IntArray:
    """The feasible configuration of the highest value, of equal ones the one of the lowest predicted latency.

    Args:
        value: `(examples, configurations)`.
        feasible: `(..., examples, configurations)`.
        predicted_ms: `(examples, configurations)`.

    Returns:
        Flat indices, `(..., examples)`.
    """
    # Rounding keeps ties that summation order alone would break.
    admitted = np.where(feasible, np.round(value, 12), -np.inf)
    ties = admitted == admitted.max(axis=-1, keepdims=True)
    return np.asarray(np.where(ties, predicted_ms, np.inf).argmin(axis=-1), dtype=np.int64)


def table_choices(swept: SweptExamples, folds: IntArray) -> IntArray:
    """The lookup table's choices, each fold's by a table fitted on the others, `(budgets, examples)`."""
    chosen = np.empty(swept.feasible.shape[:2], dtype=np.int64)
    for fold in range(NUM_FOLDS):
        train, held_out = folds != fold, np.flatnonzero(folds == fold)
        table = LookupTable.fit(
            swept.space,
            swept.budgets_ms.tolist(),
            swept.accuracy[train],
            swept.feasible[:, train],
            num_pixels=swept.num_pixels[train],
        )
        sizes = table.size_of(swept.num_pixels[held_out])
        for b, by_size in enumerate(table.orders[:, 0]):
            admitted = np.take_along_axis(swept.feasible[b, held_out], by_size[sizes], axis=1)
            chosen[b, held_out] = by_size[sizes, admitted.argmax(axis=1)]
    return chosen


# Mean latency at equal accuracy --------------------------------------------------------------------------------------


def _price_list(predicted_ms: FloatArray) -> FloatArray:
    """Prices of a millisecond, in accuracy, from none to one at which only the cheapest is worth its time."""
    mean_ms = predicted_ms.mean(axis=0)
    span_ms = max(float(mean_ms.max() - mean_ms.min()), 1e-9)
    return np.concatenate([[0.0], np.geomspace(0.01 / span_ms, 10.0 / span_ms, NUM_PRICES)])


def _priced(value: FloatArray, predicted_ms: FloatArray, prices: FloatArray) -> IntArray:
    """Choices of the largest value minus price times latency, whatever the budget, `(prices, examples)`."""
    anything = np.ones(value.shape, dtype=np.bool_)
    return np.stack([best_choice(value - price * predicted_ms, anything, predicted_ms) for price in prices])


def _priced_by_bin(swept: SweptExamples, folds: IntArray, bins: NDArray[np.str_], prices: FloatArray) -> IntArray:
    """One choice for each bin and price, fitted on the other folds, `(prices, examples)`."""
    chosen = np.empty((len(prices), len(folds)), dtype=np.int64)
    for fold, name in itertools.product(range(NUM_FOLDS), np.unique(bins)):
        held_out = (folds == fold) & (bins == name)
        train = (folds != fold) & (bins == name)
        train = train if train.any() else folds != fold
        accuracy, latency_ms = (table[train].mean(axis=0)[None] for table in (swept.accuracy, swept.predicted_ms))
        chosen[:, held_out] = _priced(accuracy, latency_ms, prices)
    return chosen


# The measurement -----------------------------------------------------------------------------------------------------


class _Means:
    """Means of columns over examples, and their intervals from one bootstrap over pictures for all of them."""

    def __init__(self, pictures: NDArray[np.str_], seed: int) -> None:
        self._places = np.unique(pictures, return_inverse=True)[1]
        self._seed = seed
        self._columns: dict[Any, FloatArray] = {"examples": np.ones(len(pictures))}
        self._means: dict[Any, FloatArray] = {}

    def add(self, key: Any, values: FloatArray) -> None:
        """A column, `(examples,)`, before anything is asked."""
        self._columns[key] = np.asarray(values, dtype=np.float64)

    def resample(self) -> None:
        per_picture = np.stack([np.bincount(self._places, column) for column in self._columns.values()], axis=1)
        # The estimates themselves in front of their resamples.
        means = resampled_means(per_picture, num_resamples=NUM_RESAMPLES, seed=self._seed)
        together = np.concatenate([per_picture.mean(axis=0)[None], means])
        self._means = dict(zip(self._columns, together.T, strict=True))

    def values(self, key: Any, among: Any = "examples") -> FloatArray:
        """The mean of a column among the examples that another one marks, and its resamples, `(1 + resamples,)`."""
        marked = self._means[among]
        return np.asarray(np.divide(self._means[key], marked, out=np.full(len(marked), np.nan), where=marked > 0))

    def interval(self, key: Any, among: Any = "examples") -> dict[str, float]:
        values = self.values(key, among)
        return percentile_interval(float(values[0]), values[1:][~np.isnan(values[1:])]).to_dict()

    def ratio(self, key: Any, among: Any) -> dict[str, float] | None:
        both = np.stack([self._means[key], self._means[among]], axis=1)
        found = ratio_interval(both[0], both[1:])
        return None if found is None else found.to_dict()


def measure_headroom(
    swept: SweptExamples, fractions: Sequence[float], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """What a controller could gain over the lookup table, at which budgets, from which knobs and on which traffic.

    Everything is a mean over examples, with its 95 % interval. The policies are the lookup table, the predictor that
    sees what stage 1 sees, the one that chooses the tier so and the rest with the latency token's output as well, and
    the oracle. Accuracies and gains are shares, from 0 to 1.

    A knob's gain `alone` is that of the predictor when only this knob may differ from the lookup table's choice. Since
    knobs are traded for each other inside a budget, that misses most; its `share` is the Shapley value (Shapley, A
    value for n-person games, 1953): what freeing it adds, averaged over all orders in which the three are freed. The
    shares add up to what is learnable. Of groups, the one that gains most is the one whose gain has the highest lower
    end of its interval, which neither a large group nor a lucky small one wins by itself; as the best of many it is a
    hint.

    Args:
        fractions: what the budgets are fractions of the full configuration's median, for the report.
        seed: of folds, trees and resamples.
        progress: called with (fits done, fits to do).

    Returns:
        What `headroom_summary.write_headroom` takes, as far as examples decide it; ready for JSON.

    Raises:
        DataError: shapes disagree, an accuracy is missing, or there are fewer pictures than folds.
    """
    if np.isnan(swept.accuracy).any():
        raise DataError("some examples did not run with every configuration; run the sweep first")
    _, feasible = check_table(swept.space, swept.budgets_ms, swept.accuracy, swept.feasible)
    swept = replace(swept, feasible=feasible).ordered()
    feasible = swept.feasible
    folds = picture_folds(swept.pictures, seed)
    rows = np.arange(len(folds))

    def scored(chosen: IntArray) -> FloatArray:
        return swept.accuracy[rows, chosen]

    views = ("stage1", "both_stages") if swept.token_outputs is not None else ("stage1",)
    num_fits, done = len(views) * len(MODELS) * NUM_FOLDS, itertools.count(1)

    def count() -> None:
        if progress is not None:
            progress(next(done), num_fits)

    tables = {"accuracy": swept.accuracy}
    chosen = {"lookup_table": table_choices(swept, folds)}
    models: dict[str, dict[str, float]] = {}
    for view in views:
        mask = feasible
        if view == "both_stages":
            tiers = chosen["stage1"] // swept.space.num_stage2
            mask = feasible & (swept.configuration_places[:, 0] == tiers[..., None])
        tried = {}
        for model in MODELS:
            with_token = view == "both_stages"
            predicted = predict_accuracy(swept, folds, model, with_token=with_token, seed=seed, progress=count)
            choice = best_choice(predicted, mask, swept.predicted_ms)
            tried[model] = (float(scored(choice).mean()), predicted, choice)
        models[view] = {model: accuracy for model, (accuracy, _, _) in tried.items()}
        _, tables[view], chosen[view] = max(tried.values(), key=lambda entry: entry[0])
    chosen["oracle"] = best_choice(swept.accuracy, feasible, swept.predicted_ms)

    means = _Means(swept.pictures, seed)
    accuracy = {name: scored(choice) for name, choice in chosen.items()}
    gains = {name: values - accuracy["lookup_table"] for name, values in accuracy.items()}
    for name in chosen:
        means.add(("gain", name), gains[name].mean(axis=0))
        for b in range(len(fractions)):
            means.add(("accuracy", name, b), accuracy[name][b])
            means.add(("gain", name, b), gains[name][b])
    full = swept.space.index(swept.space.full)
    means.add("full", swept.accuracy[:, full])
    for key_of_knob, values in _knob_gains(swept, feasible, tables["stage1"], chosen["lookup_table"]).items():
        means.add(key_of_knob, values)
    groups = {"picture size": size_bins(swept.num_pixels), **swept.groups}
    members = [(key, label) for key, labels in groups.items() for label in np.unique(labels) if (labels != label).any()]
    for key, label in members:
        member = groups[key] == label
        means.add((key, label), member.astype(np.float64))
        means.add(("gain", key, label), gains["stage1"].mean(axis=0) * member)
    fronts = _fronts(swept, folds, tables["stage1"])
    for name, choices in fronts.items():
        for point, choice in enumerate(choices):
            means.add((name, point, "accuracy"), scored(choice))
            means.add((name, point, "ms"), swept.predicted_ms[rows, choice])
    moved: BoolArray = np.zeros(len(folds), dtype=np.bool_)
    if swept.moved_accuracy is not None:
        moved |= ~np.isnan(swept.moved_accuracy).any(axis=1)
        choice = best_choice(np.where(moved[:, None], swept.moved_accuracy, 0.0), feasible, swept.predicted_ms)
        lost = (accuracy["oracle"] - scored(choice)).mean(axis=0)
        means.add("moved", moved.astype(np.float64))
        means.add("moved lead", gains["oracle"].mean(axis=0) * moved)
        means.add("moved lost", lost * moved)
    means.resample()

    def gain(name: str) -> dict[str, float] | None:
        return means.interval(("gain", name)) if name in chosen else None

    found = []
    for key, label in members:
        if len(np.unique(swept.pictures[groups[key] == label])) >= MIN_GROUP_PICTURES:
            entry = {"key": key, "value": str(label), "share": float(means.values((key, label))[0])}
            found.append({**entry, "gain": means.interval(("gain", key, label), (key, label))})
    return {
        "num_examples": len(folds),
        "num_pictures": len(np.unique(swept.pictures)),
        "seed": seed,
        "full_accuracy": means.interval("full"),
        "models": models,
        "budgets": [
            {
                "fraction": float(fraction),
                "budget_ms": float(swept.budgets_ms[b]),
                "no_choice": float((feasible[b].sum(axis=1) == 1).mean()),
                "accuracy": {name: means.interval(("accuracy", name, b)) for name in chosen},
                "gain": {name: means.interval(("gain", name, b)) for name in chosen if name != "lookup_table"},
            }
            for b, fraction in enumerate(fractions)
        ],
        "learnable": gain("stage1"),
        "learnable_both_stages": gain("both_stages"),
        "oracle_lead": gain("oracle"),
        "knobs": {
            knob: {"alone": means.interval(("alone", knob)), "share": means.interval(("share", knob))} for knob in KNOBS
        },
        "groups": found,
        "latency": [_compare_fronts(means, fronts, points) for points in POINTS_BELOW],
        "moved": None
        if not moved.any()
        else {
            "num_examples": int(moved.sum()),
            "lead": means.interval("moved lead", "moved"),
            "vanished": means.ratio("moved lost", "moved lead"),
        },
    }


def _knob_gains(
    swept: SweptExamples, feasible: BoolArray, predicted: FloatArray, table: IntArray
) -> dict[tuple[str, str], FloatArray]:
    """What each knob gains over the table, mean over budgets, `(examples,)`: freed alone, and its Shapley value."""
    places, rows = swept.configuration_places, np.arange(len(predicted))
    same = places == places[table][..., None, :]  # (budgets, examples, configurations, knobs)
    subsets = [free for size in range(len(KNOBS) + 1) for free in itertools.combinations(range(len(KNOBS)), size)]
    gains: dict[tuple[int, ...], FloatArray] = {}
    for free in subsets:
        held = [knob for knob in range(len(KNOBS)) if knob not in free]
        choice = best_choice(predicted, feasible & same[..., held].all(axis=-1), swept.predicted_ms)
        gains[free] = (swept.accuracy[rows, choice] - swept.accuracy[rows, table]).mean(axis=0)
    found = {}
    for knob, name in enumerate(KNOBS):
        found["alone", name] = gains[(knob,)]
        found["share", name] = np.zeros(len(rows))
        for before in (free for free in subsets if knob not in free):
            orders = math.factorial(len(before)) * math.factorial(len(KNOBS) - 1 - len(before))
            added = gains[tuple(sorted((*before, knob)))] - gains[before]
            found["share", name] += orders / math.factorial(len(KNOBS)) * added
    return found


def _fronts(swept: SweptExamples, folds: IntArray, predicted: FloatArray) -> dict[str, IntArray]:
    """Choices at all prices of time, `(points, examples)`: of tables, the predictor and the oracle."""
    prices = _price_list(swept.predicted_ms)
    everything = np.full(len(folds), "all")
    bins = size_bins(swept.num_pixels)
    return {
        # One of fixed knobs, one of a ranking for each third of the picture sizes: the better of both counts.
        "lookup": np.concatenate([_priced_by_bin(swept, folds, each, prices) for each in (everything, bins)]),
        "predictor": _priced(predicted, swept.predicted_ms, prices),
        "oracle": _priced(swept.accuracy, swept.predicted_ms, prices),
    }


def _compare_fronts(means: _Means, fronts: Mapping[str, IntArray], points: int) -> dict[str, Any]:
    """Mean latencies at so many points of accuracy below the full configuration, and their ratios to the tables'."""
    rows = slice(0, 1 + NUM_FRONT_RESAMPLES)
    target = means.values("full")[rows] - points / 100
    reached = {}
    for name, choices in fronts.items():
        accuracy, latency_ms = (
            np.stack([means.values((name, point, what))[rows] for point in range(len(choices))], axis=1)
            for what in ("accuracy", "ms")
        )
        reached[name] = latency_at(accuracy, latency_ms, target)

    def ratio(name: str) -> dict[str, float] | None:
        values = reached[name] / reached["lookup"]
        known = values[1:][~np.isnan(values[1:])]
        if math.isnan(values[0]) or not len(known):
            return None
        return percentile_interval(float(values[0]), known).to_dict()

    return {
        "points_below": points,
        "mean_ms": {name: None if math.isnan(values[0]) else float(values[0]) for name, values in reached.items()},
        "ratio": {name: ratio(name) for name in ("predictor", "oracle")},
    }
