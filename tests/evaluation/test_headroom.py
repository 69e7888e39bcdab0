"""Laws of the headroom on constructed worlds, in which it is known what can be gained, from which knob and where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacevlm.errors import DataError
from pacevlm.evaluation.headroom import (
    POINTS_BELOW,
    best_choice,
    measure_headroom,
    size_bins,
    table_choices,
)
from pacevlm.evaluation.headroom_summary import (
    format_headroom,
    headroom_sentence,
    headroom_warnings,
    is_learnable,
    read_headroom,
    write_headroom,
)
from pacevlm.evaluation.held_out import MODELS, NUM_FOLDS, SweptExamples, picture_folds, predict_accuracy
from pacevlm.knobs import KnobSpace

SPACE = KnobSpace(("low", "high"), (2, 4), (2, 3))
PLACES = np.array([SPACE.place(knobs) for knobs in SPACE])
FRACTIONS = (0.7, 1.0)
FACTS = {"model": "m", "dataset": "d", "metric": "exact_match", "guardrail": "g"}


def make_world(num_pictures: int = 150, *, seed: int = 0, visible: bool = True, token: bool = False) -> SweptExamples:
    """Two questions a picture. Of kind 0 half need the high tier and half all blocks, and a budget buys one of them."""
    rng = np.random.default_rng(seed)
    pictures = np.repeat(np.arange(num_pictures), 2)
    n = len(pictures)
    needs_tier, kind = rng.random(n) < 0.5, rng.integers(0, 2, n)
    met = np.where(needs_tier[:, None], PLACES[:, 0] == 1, PLACES[:, 2] == 1)
    # Of kind 1 nothing depends on the knobs.
    right = np.where(kind[:, None] == 1, 0.7, np.where(met, 0.9, 0.3))
    accuracy = (rng.random((n, 1)) < right).astype(float)
    predicted_ms = (10.0 + PLACES @ np.array([8.0, 1.0, 8.0])) * rng.uniform(0.9, 1.1, (n, 1))
    budgets_ms = 30.0 * np.array(FRACTIONS)
    content = needs_tier[:, None] * 2.0 - 1.0
    seen = np.concatenate([content, kind[:, None]], axis=1)
    features = {
        "sizes": rng.standard_normal((n, 2)),
        "question": np.concatenate(
            [seen if visible else rng.standard_normal((n, 2)), rng.standard_normal((n, 3))], axis=1
        ),
    }
    return SweptExamples(
        space=SPACE,
        budgets_ms=budgets_ms,
        accuracy=accuracy,
        feasible=predicted_ms[None] <= budgets_ms[:, None, None],
        predicted_ms=predicted_ms,
        features=features,
        token_outputs=np.concatenate([content, rng.standard_normal((n, 3))], axis=1)[:, None].repeat(2, axis=1)
        if token
        else None,
        num_pixels=rng.integers(100, 1000, n).astype(float),
        pictures=np.array([f"p{name:04}" for name in pictures]),
        example_ids=np.array([f"e{name:04}" for name in range(n)]),
        groups={"kind": np.array(["crossed", "flat"])[kind]},
    )


@pytest.fixture(scope="module")
def world() -> SweptExamples:
    return make_world()


@pytest.fixture(scope="module")
def results(world: SweptExamples) -> dict[str, Any]:
    return measure_headroom(world, FRACTIONS)


def test_content_that_decides_and_is_seen_can_be_learned(results: dict[str, Any]) -> None:
    tight, loose = (budget["gain"]["stage1"] for budget in results["budgets"])
    assert tight["mean"] > 0.08
    assert tight["low"] > 0.04
    assert abs(loose["mean"]) < 0.03  # everything fits, so the full configuration is right for all
    assert results["learnable"]["low"] > 0
    assert is_learnable(results)
    assert headroom_sentence(results).startswith("A controller can pay in accuracy and in time: ")


def test_noise_cannot_be_learned() -> None:
    # A law of many worlds: an interval may miss 0 in some, the more so as fits are not resampled.
    found = [measure_headroom(make_world(seed=seed, visible=False), FRACTIONS) for seed in range(8)]
    learnable = [each["learnable"] for each in found]
    assert abs(np.mean([interval["mean"] for interval in learnable])) < 0.01
    assert sum(interval["low"] <= 0 <= interval["high"] for interval in learnable) >= 6
    assert all(each["oracle_lead"]["low"] > 0.02 for each in found)
    nothing = {**found[0], "learnable": {"mean": 0.0, "low": -0.01, "high": 0.01}, "latency": []}
    sentence = headroom_sentence(nothing)
    assert sentence.startswith("No controller is likely to pay here")
    assert "from " not in sentence


def test_what_only_the_latency_token_shows_is_learned_by_both_stages(results: dict[str, Any]) -> None:
    world = make_world(visible=False, token=True)
    # The tier is settled before; what is left is whether all blocks run beside it.
    found = measure_headroom(world, FRACTIONS)
    assert set(found["models"]) == {"stage1", "both_stages"}
    assert found["learnable_both_stages"] is not None
    assert results["learnable_both_stages"] is None
    means = [budget["accuracy"]["both_stages"]["mean"] for budget in found["budgets"]]
    assert all(0 <= mean <= 1 for mean in means)
    predicted = predict_accuracy(world, picture_folds(world.pictures), "linear", with_token=True)
    without = predict_accuracy(world, picture_folds(world.pictures), "linear")
    assert np.mean((predicted - world.accuracy) ** 2) < np.mean((without - world.accuracy) ** 2) - 0.003


def test_the_oracle_is_above_all(results: dict[str, Any]) -> None:
    for budget in results["budgets"]:
        means = {name: interval["mean"] for name, interval in budget["accuracy"].items()}
        assert means["oracle"] == max(means.values())
        for name, interval in budget["accuracy"].items():
            assert interval["low"] <= interval["mean"] <= interval["high"], name


def test_knob_shares_add_up_and_the_sentence_names_knob_and_group() -> None:
    world = make_world()
    # Only blocks matter now: half the questions of one group are spoiled by the last block, the others need it.
    rng, n = np.random.default_rng(1), len(world.pictures)
    group, spoiled = rng.random(n) < 0.5, world.features["question"][:, 0] > 0
    all_blocks = PLACES[:, 2] == 1
    right = np.where(group[:, None], np.where(all_blocks == ~spoiled[:, None], 0.95, 0.2), 0.6)
    question = np.concatenate([world.features["question"], group[:, None], (group * spoiled)[:, None]], axis=1)
    world = dataclasses.replace(
        world,
        accuracy=(rng.random((n, 1)) < right).astype(float),
        features={**world.features, "question": question},
        groups={"family": np.where(group, "red", "blue")},
    )
    found = measure_headroom(world, FRACTIONS)
    shares = {name: knob["share"]["mean"] for name, knob in found["knobs"].items()}
    assert sum(shares.values()) == pytest.approx(found["learnable"]["mean"], abs=1e-12)
    assert max(shares, key=lambda name: shares[name]) == "num_blocks"
    assert found["knobs"]["num_blocks"]["alone"]["low"] > 0
    assert found["knobs"]["top_k"]["alone"]["mean"] == pytest.approx(0, abs=0.02)
    sentence = headroom_sentence(found)
    assert ", from num_blocks (+" in sentence
    assert "on family red" in sentence
    assert sentence.count(".") == sentence.count(".", 0, -1) + 1
    assert sentence.endswith(".")


def test_no_picture_is_in_its_own_training_part() -> None:
    world = make_world(40)
    folds = picture_folds(world.pictures)
    for name in np.unique(world.pictures):
        assert len(set(folds[world.pictures == name])) == 1
    assert sorted(set(folds)) == list(range(NUM_FOLDS))
    assert np.ptp(np.bincount(folds)) <= 2  # two questions a picture
    # What a fold's outcomes are changes nothing that is chosen or predicted for it.
    other = dataclasses.replace(world, accuracy=np.where((folds == 2)[:, None], 1 - world.accuracy, world.accuracy))
    for model in MODELS:
        before, after = (predict_accuracy(each, folds, model)[folds == 2] for each in (world, other))
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(*(table_choices(each, folds)[:, folds == 2] for each in (world, other)))
    with pytest.raises(DataError, match="at least 5"):
        picture_folds(world.pictures[:8])


def test_a_picture_that_tells_its_answers_helps_nobody() -> None:
    # Both questions of a picture have the same outcomes, and features name the picture: only a leak could use it.
    world = make_world(60, visible=False)
    names = np.unique(world.pictures, return_inverse=True)[1]
    rng = np.random.default_rng(3)
    accuracy = (rng.random((60, len(SPACE))) < 0.5).astype(float)[names]
    codes = rng.standard_normal((60, 20))[names] * 3
    world = dataclasses.replace(world, accuracy=accuracy, features={"question": codes})
    found = measure_headroom(world, FRACTIONS)
    assert found["learnable"]["low"] < 0.02
    assert found["oracle_lead"]["low"] > 0.2


def test_the_order_of_examples_changes_nothing(world: SweptExamples, results: dict[str, Any]) -> None:
    order = np.random.default_rng(5).permutation(len(world.pictures))
    shuffled = dataclasses.replace(
        world,
        accuracy=world.accuracy[order],
        feasible=world.feasible[:, order],
        predicted_ms=world.predicted_ms[order],
        features={name: block[order] for name, block in world.features.items()},
        num_pixels=world.num_pixels[order],
        pictures=world.pictures[order],
        example_ids=world.example_ids[order],
        groups={name: labels[order] for name, labels in world.groups.items()},
    )
    assert measure_headroom(shuffled, FRACTIONS) == results


def test_masks_are_obeyed_and_ties_go_to_the_faster() -> None:
    value = np.array([[0.5, 0.5 + 1e-15, 0.9, 0.5]])
    mask = np.array([[True, True, False, True]])
    assert best_choice(value, mask, np.array([[3.0, 1.0, 0.1, 2.0]])).tolist() == [1]
    world = make_world(30)
    chosen = table_choices(world, picture_folds(world.pictures))
    assert np.take_along_axis(world.feasible, chosen[..., None], axis=2).all()


def test_where_nothing_is_feasible_the_cheapest_runs() -> None:
    world = make_world(30)
    found = measure_headroom(dataclasses.replace(world, feasible=np.zeros_like(world.feasible)), FRACTIONS)
    cheapest = world.accuracy[:, SPACE.index(SPACE.cheapest)].mean()
    for budget in found["budgets"]:
        assert budget["no_choice"] == 1
        for interval in budget["accuracy"].values():
            assert interval["mean"] == pytest.approx(cheapest)
    assert found["learnable"] == {"mean": 0, "low": 0, "high": 0}
    (warning,) = headroom_warnings(found)
    assert "100 % of the requests have a single feasible configuration" in warning


def test_mean_latency_at_equal_accuracy(results: dict[str, Any]) -> None:
    assert [entry["points_below"] for entry in results["latency"]] == list(POINTS_BELOW)
    for entry in results["latency"]:
        ms, ratio = entry["mean_ms"], entry["ratio"]
        assert ms["oracle"] < ms["predictor"] < ms["lookup"]
        assert ratio["predictor"]["mean"] == pytest.approx(ms["predictor"] / ms["lookup"])
        assert ratio["predictor"]["high"] < 1
    times = [entry["mean_ms"]["lookup"] for entry in results["latency"]]
    assert times == sorted(times, reverse=True)


def test_a_front_that_does_not_reach_an_accuracy_has_no_ratio() -> None:
    world = make_world(40)
    full = SPACE.index(SPACE.full)
    accuracy = np.zeros_like(world.accuracy)
    accuracy[:, full] = 1.0
    # A predictor that must tell full from the rest does; tables do as well: all are at the full latency.
    found = measure_headroom(dataclasses.replace(world, accuracy=accuracy), FRACTIONS)
    for entry in found["latency"]:
        assert entry["ratio"]["oracle"]["mean"] == pytest.approx(1.0, abs=0.05)
    found["latency"][1]["ratio"]["predictor"] = None
    assert "of the tables' mean latency at 2 points" in headroom_sentence(found)
    for entry in found["latency"]:
        entry["ratio"]["predictor"] = None
    assert "mean latency" not in headroom_sentence(found)


def test_an_oracle_that_knows_the_pixels_alone_loses_its_lead() -> None:
    world = make_world(100)
    n = len(world.pictures)
    some = np.arange(n) < 120
    rng = np.random.default_rng(2)
    luck = (rng.random(world.accuracy.shape) < 0.5).astype(float)
    unlike = (rng.random(world.accuracy.shape) < 0.5).astype(float)
    for moved, low, high in ((world.accuracy, 0.0, 0.0), (unlike, 0.6, 1.35)):
        rows = np.where(some[:, None], moved, np.nan)
        accuracy = world.accuracy if moved is world.accuracy else luck
        found = measure_headroom(dataclasses.replace(world, accuracy=accuracy, moved_accuracy=rows), FRACTIONS)
        assert found["moved"]["num_examples"] == 120
        assert low - 1e-9 <= found["moved"]["vanished"]["mean"] <= high + 1e-9


def test_sizes_are_three_even_bins() -> None:
    assert sorted(set(size_bins(np.arange(9)))) == ["large", "medium", "small"]
    assert size_bins(np.arange(9)).tolist() == ["small"] * 3 + ["medium"] * 3 + ["large"] * 3
    assert set(size_bins([7, 7, 7])) == {"small"}


def test_unfit_arrays_are_refused(world: SweptExamples) -> None:
    missing = world.accuracy.copy()
    missing[0, 0] = np.nan
    with pytest.raises(DataError, match="every configuration"):
        measure_headroom(dataclasses.replace(world, accuracy=missing), FRACTIONS)
    with pytest.raises(DataError, match="shape"):
        measure_headroom(dataclasses.replace(world, feasible=world.feasible[:, :-1]), FRACTIONS)


def test_the_report_shows_it_and_the_controllers_share_of_it(results: dict[str, Any], tmp_path: Path) -> None:
    from pacevlm.evaluation.report import _headroom, _tiles

    whole = {**FACTS, **results}
    shown = _headroom(whole)
    assert shown["sentences"][0] == headroom_sentence(whole)
    assert [len(rows) for _, _, rows in shown["tables"]] == [3, 3, len(results["groups"]), len(POINTS_BELOW)]
    assert all(len(row) == 1 + len(headings) for _, headings, rows in shown["tables"] for row in rows)
    half = {"mean": results["learnable"]["mean"] / 2, "low": 0.0, "high": 0.1}
    evaluated: dict[str, Any] = {
        "average": {"controller": half},
        "gap_closed": None,
        "budgets": [{"fraction": fraction, "policies": {}} for fraction in FRACTIONS],
        "full": {"accuracy": None},
        "metric": {"name": "exact_match"},
    }
    titles = {tile["title"]: tile["value"] for tile in _tiles(evaluated, whole)}
    assert titles["controller's gain, of what is learnable"] == "50 %"
    nothing = {**whole, "learnable": {"mean": 0.001, "low": -0.01, "high": 0.01}}
    for headroom in (None, nothing, {**whole, "metric": "vqa"}, {**whole, "budgets": whole["budgets"][:1]}):
        assert not [tile for tile in _tiles(evaluated, headroom) if "learnable" in tile["title"]]


def test_results_are_stored_checked_and_shown(results: dict[str, Any], tmp_path: Path) -> None:
    path, whole = tmp_path / "headroom.json", {**FACTS, **results}
    write_headroom(path, whole)
    assert read_headroom(path) == json.loads(json.dumps(whole))
    text = format_headroom(whole)
    assert headroom_sentence(whole)[:60] in text
    assert "num_blocks" in text
    assert len([line for line in text.splitlines() if line.strip()]) > 15
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="changed or damaged"):
        read_headroom(path)
    write_headroom(path, {**whole, "learnable": None})
    with pytest.raises(DataError, match="learnable"):
        read_headroom(path)
