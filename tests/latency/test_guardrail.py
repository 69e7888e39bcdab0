"""The guardrail keeps its promise in every group, and its masks are what the bounds say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacevlm.artefact import content_sha256
from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail, calibrate, feasible_knobs, group_of
from pacevlm.latency.profile import Sample
from pacevlm.types import RequestSizes


def feasibility(guardrail: Guardrail, sizes: RequestSizes, budget_ms: float, num_tokens: int) -> tuple[Any, bool]:
    """Mask of one request, and whether anything fits."""
    mask, any_feasible = feasible_knobs(guardrail.upper_bounds_ms(sizes, num_tokens)[None], [budget_ms])
    return mask[0], bool(any_feasible[0])


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
    picture = flat_calibration(9.0, all=0.3)
    guardrail = Guardrail(estimator, "tier", {"e2e": flat_calibration(9.0, **margins)}, picture)
    picture_ms, rest_ms = estimator.split_many_ms([sizes], [7])
    expected = np.exp(0.3) * picture_ms[0][:, None, None] + rest_ms[0] * np.exp([0.0, 0.1, 0.2])[:, None, None]
    np.testing.assert_allclose(guardrail.upper_bounds_ms(sizes, 7), expected, rtol=1e-14)


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
@pytest.mark.parametrize("margin", [1.0, 1.2, 3.0])
def test_a_margin_makes_every_bound_a_multiple_of_the_prediction(
    kind: Any, margin: float, random_estimator: Any, random_sizes: Any
) -> None:
    """Whatever was calibrated before; and what is beyond the profile stays without a promise."""
    rng = np.random.default_rng(11)
    estimator = random_estimator(rng)
    noisy = {"e2e": flat_calibration(9.0, low=0.7, high=0.1), "ttft": flat_calibration(0.4)}
    guardrail = Guardrail(estimator, "tier", noisy, flat_calibration(9.0, all=0.3)).with_margin(margin)
    inside = dataclasses.replace(random_sizes(rng), picture_kind="jpeg", num_pixels=1_000_000, num_bytes=900_000)
    inside = dataclasses.replace(inside, num_text_tokens=200)
    outside = dataclasses.replace(inside, num_text_tokens=5_000)
    predicted_ms = estimator.predict_many([inside], [7], kind)[0]
    for axis in range(3):
        predicted_ms = np.maximum.accumulate(predicted_ms, axis=axis)
    bounds_ms = guardrail.upper_bounds_many_ms([inside, outside], [7, 7], kind)
    np.testing.assert_allclose(bounds_ms[0], margin * predicted_ms, rtol=1e-12)
    assert np.isposinf(bounds_ms[1]).all()


def test_the_pictures_part_is_calibrated_on_large_ones(make_device: Any, make_profile: Any) -> None:
    rng = np.random.default_rng(14)
    estimator = LatencyEstimator.fit(make_profile(make_device().measure(rng, 200)), trained_top_k=8)

    def slowed(sample: Sample, factor: float) -> Sample:
        times = sample.stages
        part_ms = {name: factor * getattr(times, name) for name in ("read_ms", "prepare_ms")}
        grown_ms = sum(part_ms.values()) - times.read_ms - times.prepare_ms
        return dataclasses.replace(sample, stages=dataclasses.replace(times, **part_ms, e2e_ms=times.e2e_ms + grown_ms))

    # Large pictures take 1.5 times as long as predicted, small ones 40 times: that is not how large ones scatter.
    large = [slowed(s, 1.5) for s in make_device().measure(rng, 300) if s.num_pixels > 1_000_000]
    small = [slowed(s, 40.0) for s in make_device().measure(rng, 300) if s.num_pixels <= 1_000_000]
    guardrail = Guardrail.from_samples(estimator, large + small, 0.1, "none")
    assert guardrail.picture.factor("all") == pytest.approx(1.5, rel=1e-3)
    # Small ones are covered all the same: what exceeds their picture's part counts in the rest.
    late = [
        s.stages.e2e_ms > bound
        for s, bound in zip(large + small, guardrail.bound_samples_ms(large + small), strict=True)
    ]
    assert np.mean(late) <= 0.1
    # Without large ones, the largest that there are.
    assert Guardrail.from_samples(estimator, small, 0.1, "none").picture.factor("all") == pytest.approx(40, rel=1e-3)


def test_bounds_never_fall_when_a_knob_grows(space: KnobSpace, random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        estimator, sizes = random_estimator(rng), random_sizes(rng)
        margins = {str(knobs): float(rng.normal(0, 0.5)) for knobs in space}
        guardrail = Guardrail(estimator, "knobs", {"e2e": flat_calibration(0.0, **margins)}, flat_calibration())
        bounds = guardrail.upper_bounds_ms(sizes, 5)
        for axis in range(bounds.ndim):
            assert (np.diff(bounds, axis=axis) >= 0).all()
        factors = np.array([np.exp(margins[str(knobs)]) for knobs in space]).reshape(space.shape)
        picture_ms, rest_ms = estimator.split_many_ms([sizes], [5])
        own = picture_ms[0][:, None, None] + rest_ms[0] * factors
        assert (bounds >= own * (1 - 1e-12)).all()


def test_mask_is_what_the_bounds_allow(random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        guardrail = Guardrail(random_estimator(rng), "none", {"e2e": flat_calibration(0.1)}, flat_calibration())
        sizes = random_sizes(rng)
        bounds = guardrail.upper_bounds_ms(sizes, 6)
        budget_ms = float(rng.choice(bounds.ravel()))
        mask, any_feasible = feasibility(guardrail, sizes, budget_ms, 6)
        np.testing.assert_array_equal(mask, bounds <= budget_ms)
        assert any_feasible
        assert mask[0, 0, 0]
        larger, _ = feasibility(guardrail, sizes, 1.1 * budget_ms, 6)
        assert (larger >= mask).all()
        longer, _ = feasibility(guardrail, sizes, budget_ms, 7)
        assert (longer[1:] <= mask[1:]).all()


def test_nothing_feasible_leaves_the_cheapest(
    make_device: Any, make_profile: Any, random_sizes: Any, space: KnobSpace
) -> None:
    rng = np.random.default_rng(6)
    estimator = LatencyEstimator.fit(make_profile(make_device().measure(rng, 80)), trained_top_k=8)
    guardrail = Guardrail(
        estimator, "tier", {"e2e": flat_calibration(), "ttft": flat_calibration()}, flat_calibration()
    )
    sizes = [random_sizes(rng) for _ in range(3)]
    mask, any_feasible = feasibility(guardrail, sizes[0], 1e-3, 4)
    assert not any_feasible
    assert np.argwhere(mask).tolist() == [[0, 0, 0]]
    assert space[int(np.flatnonzero(mask)[0])] == space.cheapest
    # In a batch every request has its own budget and flag.
    batch = feasible_knobs(guardrail.upper_bounds_many_ms(sizes, [4, 4, 4]), [1e-3, 1e6, 150.0])
    assert batch.any_feasible[:2].tolist() == [False, True]
    for row, budget_ms in enumerate((1e-3, 1e6, 150.0)):
        mask, any_feasible = feasibility(guardrail, sizes[row], budget_ms, 4)
        np.testing.assert_array_equal(batch.mask[row], mask)
        assert batch.any_feasible[row] == any_feasible
    assert batch.mask[1].all()
    # A time to the first token is never above that to the last.
    assert (guardrail.upper_bounds_ms(sizes[0], 9, "ttft") < guardrail.upper_bounds_ms(sizes[0], 9, "e2e")).all()


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
        Guardrail(estimator, "tier", {}, flat_calibration())
    guardrail = Guardrail(estimator, "tier", {"e2e": flat_calibration()}, flat_calibration())
    with pytest.raises(ProfileError, match="not for 'ttft'"):
        guardrail.upper_bounds_ms(sizes, 3, "ttft")
    with pytest.raises(ConfigError):
        guardrail.upper_bounds_ms(sizes, 3, "total")  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="budgets"):
        feasible_knobs(guardrail.upper_bounds_many_ms([sizes, sizes], [3, 3]), [5.0])


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_beyond_what_was_profiled_nothing_is_promised(kind: Any, random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(10)
    estimator = random_estimator(rng)
    guardrail = Guardrail(estimator, "none", dict.fromkeys(("e2e", "ttft"), flat_calibration()), flat_calibration())
    inside = dataclasses.replace(random_sizes(rng), picture_kind="jpeg", num_pixels=5_000_000, num_bytes=4_000_000)
    inside = dataclasses.replace(inside, num_text_tokens=200)
    outside = [
        dataclasses.replace(inside, **{name: value})
        for name, value in (
            ("picture_kind", "gif"),
            ("num_pixels", 5_300_000),
            ("num_bytes", 4_300_000),
            ("num_text_tokens", 211),
        )
    ]
    bounds_ms = guardrail.upper_bounds_many_ms([inside, *outside], [3] * 5, kind)
    assert np.isfinite(bounds_ms[0]).all()
    assert np.isposinf(bounds_ms[1:]).all()
    batch = feasible_knobs(bounds_ms, [1e300] * 5)
    assert batch.any_feasible.tolist() == [True, *[False] * 4]
    assert batch.mask[0].all()
    assert [np.argwhere(mask).tolist() for mask in batch.mask[1:]] == [[[0, 0, 0]]] * 4
    # The predictions themselves stay numbers, so that whatever averages them can.
    assert np.isfinite(estimator.predict_many([inside, *outside], [3] * 5, kind)).all()
    # A little above the largest is as good as the largest.
    assert np.isfinite(guardrail.upper_bounds_ms(dataclasses.replace(inside, num_pixels=5_200_000), 3, kind)).all()


def test_small_pictures_do_not_loosen_what_bounds_large_ones(make_device: Any, make_profile: Any) -> None:
    # Reading varies by a third and the model by little: a margin learned on small pictures knows nothing of that.
    rng, alpha = np.random.default_rng(11), 0.1

    def measure(count: int, small: bool) -> list[Sample]:
        samples = [s for s in make_device(noise=0.01).measure(rng, 4 * count) if s.picture_kind != "memory"][:count]
        measured = []
        for sample in samples:
            if small:
                sizes = {"num_pixels": 9_000, "num_bytes": 900}
                times = make_device().stages(rng, sizes_of(sample) | sizes, sample.knobs)
                sample = dataclasses.replace(sample, **sizes, stages=times)
            times = sample.stages
            read_ms = times.read_ms * float(np.exp(0.3 * rng.standard_normal()))
            times = dataclasses.replace(times, read_ms=read_ms, e2e_ms=times.e2e_ms + read_ms - times.read_ms)
            measured.append(dataclasses.replace(sample, stages=times))
        return measured

    estimator = LatencyEstimator.fit(make_profile(make_device().measure(rng, 300)), trained_top_k=8)
    profiled = Guardrail.from_samples(estimator, measure(300, small=False), alpha)
    again = Guardrail.from_samples(estimator, measure(300, small=True), alpha, picture=profiled.picture)
    large, small = measure(600, small=False), measure(600, small=True)
    for samples, misses in ((small, alpha), (large, 2 * alpha)):
        late = np.array([sample.stages.e2e_ms for sample in samples]) > again.bound_samples_ms(samples)
        assert late.mean() <= misses + 3 * (misses / 600) ** 0.5
    # A single factor learned on small pictures would have been exceeded by a third of the large ones or more.
    ratios = [np.array([s.stages.e2e_ms for s in part]) / estimator.predict_samples(part) for part in (small, large)]
    assert np.mean(ratios[1] > np.quantile(ratios[0], 1 - alpha)) > 0.3


def sizes_of(sample: Sample) -> dict[str, Any]:
    names = ("num_units", "num_image_tokens", "num_text_tokens", "num_pixels", "num_output_tokens", "num_bytes")
    return {name: getattr(sample, name) for name in names} | {"picture_kind": sample.picture_kind}


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
    with pytest.raises(IdentityError, match="another latency estimator"):
        Guardrail.load(path, other)
    whole = json.loads(path.read_text())
    del whole["sha256"]

    def write(**change: Any) -> None:
        """The file with changed values, under a digest that fits them."""
        values = whole | change
        path.write_text(json.dumps({**values, "sha256": content_sha256(values)}))

    for change in (
        {"group_by": "colour"},
        {"picture": {}},
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
