"""The guardrail keeps its promise in every group, and its masks are what the bounds say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacevlm.errors import BudgetError, ConfigError, IdentityError, ProfileError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail, calibrate, group_of


def flat_calibration(log_margin: float = 0.0, **log_margins: float) -> Calibration:
    return Calibration(0.1, log_margins, log_margin, {})


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25])
def test_coverage_in_every_group(alpha: float) -> None:
    # A calm group and a wild, biased one: a bound on both together would fail the second.
    rng = np.random.default_rng(0)
    num_trials, num_scores = 3000, 60
    spread, bias = {"calm": 0.01, "wild": 0.3}, {"calm": 0.0, "wild": 0.2}
    covered = dict.fromkeys(spread, 0)
    groups = ["calm"] * num_scores + ["wild"] * num_scores
    for _ in range(num_trials):
        ratios = {name: np.exp(bias[name] + spread[name] * rng.standard_normal(num_scores + 1)) for name in spread}
        measured = np.concatenate([ratios["calm"][:-1], ratios["wild"][:-1]]) * 50.0
        calibration = calibrate(np.full(2 * num_scores, 50.0), measured, groups, alpha)
        for name in spread:
            covered[name] += ratios[name][-1] <= calibration.factor(name)
    # One new request per calibration: independent trials. The promise is 1 - alpha, and at most 1 / (n + 1) more.
    slack = 4 * (alpha * (1 - alpha) / num_trials) ** 0.5
    for name in spread:
        assert 1 - alpha - slack <= covered[name] / num_trials <= 1 - alpha + 1 / (num_scores + 1) + slack


def test_smaller_alpha_never_lowers_a_bound() -> None:
    rng = np.random.default_rng(1)
    groups = ["a"] * 200 + ["b"] * 12 + ["c"] * 2
    measured = np.exp(0.2 * rng.standard_normal(len(groups)))
    factors = [
        [calibrate(np.ones(len(groups)), measured, groups, alpha).factor(name) for name in ("a", "b", "c", "unseen")]
        for alpha in (0.5, 0.3, 0.1, 0.05, 0.01)
    ]
    assert (np.diff(factors, axis=0) >= 0).all()
    assert factors[-1][0] > factors[0][0]


def test_groups_with_too_few_samples_get_the_largest_of_all() -> None:
    measured = np.concatenate([np.linspace(1.0, 1.2, 50), [0.5], [3.0]])
    calibration = calibrate(np.ones(52), measured, ["a"] * 50 + ["b"] + ["c"], 0.1)
    assert set(calibration.log_margins) == {"a"}
    assert calibration.num_samples == {"a": 50, "b": 1, "c": 1}
    for group in ("b", "c", "unseen"):
        assert calibration.factor(group) == pytest.approx(3.0)
    assert calibration.factor("a") < 1.2


def test_calibrated_on_samples_covers_new_samples(make_device: Any, make_profile: Any) -> None:
    rng = np.random.default_rng(2)
    device, alpha = make_device(noise=0.08, outlier_rate=0.01), 0.1
    estimator = LatencyEstimator.fit(make_profile(device.measure(rng, 300)), trained_top_k=8)
    guardrail = Guardrail.from_samples(estimator, device.measure(rng, 900), alpha)
    fresh = device.measure(rng, 900)
    for kind in ("e2e", "ttft"):
        measured = np.array([getattr(sample.stages, f"{kind}_ms") for sample in fresh])
        factors = np.array([guardrail.calibrations[kind].factor(sample.knobs.tier) for sample in fresh])
        tiers = np.array([sample.knobs.tier for sample in fresh])
        covered = measured <= estimator.predict_samples(fresh, kind) * factors
        for tier in ("low", "medium", "high"):
            # About 300 samples calibrate and 300 test: both vary.
            assert covered[tiers == tier].mean() >= 1 - alpha - 3 * (2 * alpha * (1 - alpha) / 300) ** 0.5
        assert covered.mean() < 0.97  # nor is it a bound that nothing could exceed


def test_bounds_are_calibrated_predictions(random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(3)
    estimator, sizes = random_estimator(rng), random_sizes(rng)
    margins = {"low": 0.0, "medium": 0.1, "high": 0.2}
    guardrail = Guardrail(estimator, "tier", {"e2e": flat_calibration(9.0, **margins)})
    expected = estimator.predict_all(sizes, 7) * np.exp([0.0, 0.1, 0.2])[:, None, None]
    np.testing.assert_allclose(guardrail.upper_bounds_ms(sizes, 7), expected, rtol=1e-14)


def test_bounds_never_fall_when_a_knob_grows(space: KnobSpace, random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        estimator, sizes = random_estimator(rng), random_sizes(rng)
        margins = {str(knobs): float(rng.normal(0, 0.5)) for knobs in space}
        guardrail = Guardrail(estimator, "knobs", {"e2e": flat_calibration(0.0, **margins)})
        bounds = guardrail.upper_bounds_ms(sizes, 5)
        for axis in range(3):
            assert (np.diff(bounds, axis=axis) >= 0).all()
        factors = np.array([np.exp(margins[str(knobs)]) for knobs in space]).reshape(space.shape)
        assert (bounds >= estimator.predict_all(sizes, 5) * factors * (1 - 1e-12)).all()


def test_mask_is_what_the_bounds_allow(random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        guardrail = Guardrail(random_estimator(rng), "none", {"e2e": flat_calibration(0.1)})
        sizes = random_sizes(rng)
        bounds = guardrail.upper_bounds_ms(sizes, 6)
        budget_ms = float(rng.choice(bounds.ravel()))
        mask, any_feasible = guardrail.feasible_mask(sizes, budget_ms, 6)
        np.testing.assert_array_equal(mask, bounds <= budget_ms)
        assert any_feasible
        assert mask[0, 0, 0]
        larger, _ = guardrail.feasible_mask(sizes, 1.1 * budget_ms, 6)
        assert (larger >= mask).all()
        longer, _ = guardrail.feasible_mask(sizes, budget_ms, 7)
        assert (longer[1:] <= mask[1:]).all()


def test_nothing_feasible_leaves_the_cheapest(
    make_device: Any, make_profile: Any, random_sizes: Any, space: KnobSpace
) -> None:
    rng = np.random.default_rng(6)
    estimator = LatencyEstimator.fit(make_profile(make_device().measure(rng, 80)), trained_top_k=8)
    guardrail = Guardrail(estimator, "tier", {"e2e": flat_calibration(), "ttft": flat_calibration()})
    sizes = [random_sizes(rng) for _ in range(3)]
    mask, any_feasible = guardrail.feasible_mask(sizes[0], 1e-3, 4)
    assert not any_feasible
    assert np.argwhere(mask).tolist() == [[0, 0, 0]]
    assert space[int(np.flatnonzero(mask)[0])] == space.cheapest
    # In a batch every request has its own budget and flag.
    batch = guardrail.feasible_masks(sizes, np.array([1e-3, 1e6, 150.0]), [4, 4, 4])
    assert batch.any_feasible[:2].tolist() == [False, True]
    for row, budget_ms in enumerate((1e-3, 1e6, 150.0)):
        one = guardrail.feasible_mask(sizes[row], budget_ms, 4)
        np.testing.assert_array_equal(batch.mask[row], one.mask)
        assert batch.any_feasible[row] == one.any_feasible
    assert batch.mask[1].all()
    # A time to the first token is never above that to the last.
    assert (guardrail.upper_bounds_ms(sizes[0], 9, "ttft") < guardrail.upper_bounds_ms(sizes[0], 9, "e2e")).all()


@pytest.mark.parametrize("budget_ms", [0, -5.0, float("nan"), float("inf"), "80", None, True])
def test_bad_budgets_are_refused(budget_ms: Any, random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(7)
    guardrail = Guardrail(random_estimator(rng), "tier", {"e2e": flat_calibration()})
    with pytest.raises(BudgetError):
        guardrail.feasible_mask(random_sizes(rng), budget_ms, 3)


def test_bad_calibrations_are_refused(random_estimator: Any, random_sizes: Any) -> None:
    ones = np.ones(20)
    for predicted, measured, groups in (
        (ones, ones[:-1], ["a"] * 20),
        (ones, ones, ["a"] * 19),
        (ones, ones * np.nan, ["a"] * 20),
        (ones * 0, ones, ["a"] * 20),
        (ones[:8], ones[:8], ["a"] * 8),
        (ones[:0], ones[:0], []),
    ):
        with pytest.raises(ProfileError):
            calibrate(predicted, measured, groups, 0.1)
    with pytest.raises(ConfigError):
        calibrate(ones, ones, ["a"] * 20, 1.5)
    with pytest.raises(ConfigError, match="group_by"):
        group_of(Knobs("low", 4, 12), "colour")  # type: ignore[arg-type]
    rng = np.random.default_rng(8)
    estimator, sizes = random_estimator(rng), random_sizes(rng)
    with pytest.raises(ProfileError, match="at least one"):
        Guardrail(estimator, "tier", {})
    guardrail = Guardrail(estimator, "tier", {"e2e": flat_calibration()})
    with pytest.raises(ProfileError, match="not for 'ttft'"):
        guardrail.upper_bounds_ms(sizes, 3, "ttft")
    with pytest.raises(ConfigError):
        guardrail.upper_bounds_ms(sizes, 3, "total")  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="budgets"):
        guardrail.feasible_masks([sizes, sizes], [5.0], [3, 3])


def test_groups_are_named_after_their_knobs() -> None:
    knobs = Knobs("low", 4, 12)
    assert [group_of(knobs, by) for by in ("none", "tier", "top_k", "num_blocks", "knobs")] == [
        "all",
        "low",
        "4",
        "12",
        "low/4/12",
    ]


def test_round_trip_and_identity(
    tmp_path: Path, make_device: Any, make_profile: Any, random_sizes: Any, reseal: Any
) -> None:
    rng = np.random.default_rng(9)
    device = make_device(noise=0.1)
    estimator = LatencyEstimator.fit(make_profile(device.measure(rng, 100)), trained_top_k=8)
    guardrail = Guardrail.from_samples(estimator, device.measure(rng, 200), 0.1)
    estimator.save(tmp_path / "estimator.json")
    path = tmp_path / "guardrail.json"
    guardrail.save(path)
    loaded = Guardrail.load(path, LatencyEstimator.load(tmp_path / "estimator.json"))
    assert loaded == guardrail
    sizes = random_sizes(rng)
    for kind in ("e2e", "ttft"):
        np.testing.assert_array_equal(loaded.upper_bounds_ms(sizes, 8, kind), guardrail.upper_bounds_ms(sizes, 8, kind))
    # The same profile fitted to other samples is another estimator.
    other = LatencyEstimator.fit(make_profile(device.measure(rng, 100)), trained_top_k=8)
    with pytest.raises(IdentityError, match="coefficients"):
        Guardrail.load(path, other)
    whole = json.loads(path.read_text())
    for change in (
        {"group_by": "colour"},
        {"calibrations": {}},
        {"calibrations": {"e2e": {}}},
        {"calibrations": {"total": whole["calibrations"]["e2e"]}},
        {"calibrations": {"e2e": {**whole["calibrations"]["e2e"], "alpha": 3}}},
        {"calibrations": {"e2e": {**whole["calibrations"]["e2e"], "log_margins": {"low": "x"}}}},
        {"calibrations": {"e2e": {**whole["calibrations"]["e2e"], "log_margins": {"tiny": 0.1}}}},
        {"calibrations": {"e2e": {**whole["calibrations"]["e2e"], "fallback_log_margin": -7.0}}},
        {"calibrations": {"e2e": {**whole["calibrations"]["e2e"], "num_samples": {"low": 1.5}}}},
        {"schema_version": 7},
        {"knob_space": None},
    ):
        reseal(path, {**whole, **change})
        with pytest.raises(ProfileError):
            Guardrail.load(path, estimator)
    reseal(path, {**whole, "model_identity": "weights-b"})
    with pytest.raises(IdentityError, match="weights-b"):
        Guardrail.load(path, estimator)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_bounds_are_those_of_crepes(alpha: float) -> None:
    from crepes import ConformalPredictiveSystem

    rng = np.random.default_rng(int(100 * alpha))
    groups = np.array(["low"] * 80 + ["medium"] * 131 + ["high"] * 57)
    spread = {"low": 0.02, "medium": 0.1, "high": 0.3}
    scores = np.array([spread[group] for group in groups]) * rng.standard_normal(len(groups))
    calibration = calibrate(np.ones(len(groups)), np.exp(scores), groups.tolist(), alpha)
    reference = ConformalPredictiveSystem().fit(residuals=scores, bins=groups)
    for group, margin in calibration.log_margins.items():
        bound = reference.predict_percentiles(
            np.zeros(1), bins=np.array([group]), higher_percentiles=[100 * (1 - alpha)]
        )
        assert margin == pytest.approx(float(np.ravel(bound)[0]), abs=1e-12)
