"""The drift correction keeps its miss rate on machines that slow down, and leaves a quiet machine alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.latency.drift import DriftCorrection, DriftSettings
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail

Array = NDArray[np.float64]

ALPHA = DriftSettings().alpha
SEEDS = range(10)
# The quantile of the normal distribution at which a calibrated bound lies.
NORMAL_QUANTILE = 1.6449
OUTLIER = 10.0


class Stream(NamedTuple):
    """What a correction did: the factor in force, and whether the bound was exceeded, at every request `(n,)`."""

    factors: Array
    missed: NDArray[np.bool_]


def quiet_ratios(num_requests: int, seed: int, noise: float = 0.1, correlation: float = 0.0) -> Array:
    """Measured latencies over bounds that miss with probability alpha, `(n,)`."""
    normal = np.random.default_rng(seed).standard_normal(num_requests)
    for i in range(1, num_requests):
        normal[i] = correlation * normal[i - 1] + math.sqrt(1 - correlation**2) * normal[i]
    return np.asarray(np.exp(noise * (normal - NORMAL_QUANTILE)))


def follow(ratios: Array, settings: DriftSettings | None = None, drift: DriftCorrection | None = None) -> Stream:
    drift = DriftCorrection("estimator", settings=settings) if drift is None else drift
    # Bounds of different requests differ; only the ratio may matter.
    bounds_ms = np.random.default_rng(0).uniform(5.0, 500.0, len(ratios))
    factors, missed = [], []
    for bound_ms, ratio in zip(bounds_ms, ratios, strict=True):
        factors.append(drift.factor)
        missed.append(bound_ms * ratio > bound_ms * drift.factor)
        drift.observe(float(bound_ms), float(bound_ms * ratio))
    return Stream(np.array(factors), np.array(missed))


def at_most_alpha(missed: NDArray[np.bool_], alpha: float = ALPHA) -> bool:
    """Whether a miss rate is at most alpha, give or take three standard errors of so many requests."""
    return bool(missed.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / missed.size))


# Following the machine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "correlation"), [(0.03, 0.0), (0.1, 0.0), (0.1, 0.8)])
def test_a_quiet_machine_keeps_its_bounds(noise: float, correlation: float) -> None:
    streams = [follow(quiet_ratios(900, seed, noise, correlation)) for seed in SEEDS]
    missed = np.stack([stream.missed for stream in streams])
    factors = np.stack([stream.factors for stream in streams])
    assert at_most_alpha(missed)
    # Not by being overly cautious: the promise is made use of, and bounds stay within the noise of what they were.
    assert missed.mean() > ALPHA / 3
    assert abs(np.log(factors).mean()) < noise / 2
    assert np.abs(np.log(factors)).max() < 4 * noise


def test_first_requests_of_a_quiet_machine_change_nothing() -> None:
    count = DriftSettings().min_observations
    factors = np.stack([follow(quiet_ratios(count, seed)).factors for seed in range(40)])
    assert np.mean((factors == 1.0).all(axis=1)) > 0.9
    # A faster machine is not believed before the window is full.
    fast = follow(quiet_ratios(200, 0) * 0.8).factors
    assert (fast[: DriftSettings().window + 1] == 1.0).all()
    assert fast[100:].mean() < 0.9


@pytest.mark.parametrize("slowdown", [1.3, 2.0, 8.0])
@pytest.mark.parametrize("noise", [0.05, 0.12])
def test_a_step_is_followed_there_and_back(slowdown: float, noise: float) -> None:
    streams = []
    for seed in SEEDS:
        ratios = quiet_ratios(900, seed, noise)
        ratios[300:600] *= slowdown
        streams.append(follow(ratios))
    missed = np.stack([stream.missed for stream in streams])
    factors = np.stack([stream.factors for stream in streams])
    for start in (300, 600):
        assert at_most_alpha(missed[:, start + 100 : start + 300])
    assert at_most_alpha(missed[:, 320:400])  # from the 21st request on
    assert at_most_alpha(missed[:, 600:700])  # a machine that recovers is never late
    # The factor is that of the machine, and comes back; on the way it is larger, but no more than `outlier_ratio`.
    assert factors[:, 400:600].mean() == pytest.approx(slowdown, rel=0.06)
    assert factors[:, 700:].mean() == pytest.approx(1.0, abs=0.06)
    assert factors.max() <= slowdown * DriftSettings().outlier_ratio * math.exp(noise)


def test_a_step_is_noticed_at_once() -> None:
    missed = []
    for seed in SEEDS:
        ratios = quiet_ratios(340, seed)
        ratios[300:] *= 2.0
        missed.append(follow(ratios).missed[300:].sum())
    assert np.mean(missed) < 4


def test_a_creeping_slowdown_is_followed() -> None:
    slope = np.interp(np.arange(900), [0, 300, 500, 700, 900], [0.0, 0.0, 0.7, 0.0, 0.0])
    missed = [follow(quiet_ratios(900, seed) * np.exp(slope)).missed[300:500] for seed in SEEDS]
    assert at_most_alpha(np.stack(missed))


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 8.0])
def test_a_start_within_a_slowdown_is_corrected_soon(slowdown: float) -> None:
    streams = [follow(quiet_ratios(300, seed) * slowdown) for seed in SEEDS]
    missed = np.stack([stream.missed for stream in streams])
    factors = np.stack([stream.factors for stream in streams])
    assert missed[:, :20].sum(axis=1).mean() < 10
    assert at_most_alpha(missed[:, 60:])
    assert (factors[:, 20] > 0.8 * slowdown).all()
    assert factors[:, 100:].mean() == pytest.approx(slowdown, rel=0.06)


@pytest.mark.parametrize("place", [0, 1, 10, 39, 200])
def test_one_outlier_is_no_slowdown(place: int) -> None:
    for seed in SEEDS:
        ratios = quiet_ratios(400, seed)
        without = follow(ratios).factors
        ratios[place] = OUTLIER
        with_it = follow(ratios).factors
        # A share of `outlier_ratio` by way of the level, and the next larger one of the usual residuals.
        assert (with_it / without).max() < 1.5
        assert np.array_equal(with_it[:place], without[:place])
        # Levels forget by halves; residuals at the end of the window.
        assert with_it[place + 150 :] == pytest.approx(without[place + 150 :], rel=0.1)


def test_lasting_outliers_are_a_slowdown() -> None:
    ratios = quiet_ratios(300, 0)
    ratios[200:] *= OUTLIER
    stream = follow(ratios)
    assert not stream.missed[220:].any()
    assert stream.factors[-1] == pytest.approx(OUTLIER, rel=0.2)


def test_rare_outliers_never_pass_the_limit_of_one_request() -> None:
    for seed in SEEDS:
        ratios = quiet_ratios(900, seed)
        ratios[np.random.default_rng([seed, 1]).random(900) < 0.02] *= OUTLIER
        stream = follow(ratios)
        assert at_most_alpha(stream.missed)
        assert stream.factors.max() < 2 * DriftSettings().outlier_ratio


@pytest.mark.parametrize(("ratio", "limit"), [(1e12, 16.0), (1e-12, 0.5), (1e300, 16.0)])
def test_the_factor_has_limits(ratio: float, limit: float) -> None:
    drift = DriftCorrection("estimator")
    for _ in range(3000):
        drift.observe(1.0, ratio)
        assert 0.5 <= drift.factor <= 16.0
    assert drift.factor == limit
    settings = DriftSettings(min_factor=1.0, max_factor=1.0)
    assert (follow(np.full(200, ratio), settings).factors == 1.0).all()


def test_other_miss_rates_are_kept_too() -> None:
    for settings in (DriftSettings(alpha=0.1), DriftSettings(alpha=0.025, window=120, min_observations=80)):
        missed = [follow(2.0 * quiet_ratios(900, seed), settings).missed[200:] for seed in SEEDS]
        assert at_most_alpha(np.stack(missed), settings.alpha)


def test_the_aim_follows_the_misses() -> None:
    # Gibbs and Candès, equation 2, by hand; without noise the bound is met exactly and never missed.
    settings = DriftSettings(window=400)
    drift = DriftCorrection("estimator", settings=settings)
    for _ in range(100):
        drift.observe(10.0, 9.0)
    assert drift.metrics()["drift/alpha"] == ALPHA
    drift.observe(10.0, 12.0)
    lowered = ALPHA + settings.step_size * (ALPHA - 1)
    lowest = 2 / (settings.window + 1)
    assert drift.metrics()["drift/alpha"] == pytest.approx(max(lowered, lowest))
    drift.observe(10.0, 9.0)
    assert drift.metrics()["drift/alpha"] == pytest.approx(max(lowered, lowest) + settings.step_size * ALPHA)


def test_metrics_are_plain_numbers() -> None:
    drift = DriftCorrection("estimator")
    names = {f"drift/{name}" for name in ("factor", "level", "alpha", "violation_rate", "num_observations")}
    fresh = {"drift/factor": 1.0, "drift/level": 1.0, "drift/alpha": ALPHA, "drift/violation_rate": 0.0}
    assert drift.metrics() == {**fresh, "drift/num_observations": 0.0}
    stream = follow(2.0 * quiet_ratios(200, 0), drift=drift)
    metrics = drift.metrics()
    assert set(metrics) == names
    assert all(type(value) is float for value in metrics.values())
    assert metrics["drift/factor"] == drift.factor
    assert metrics["drift/violation_rate"] == stream.missed[-60:].mean()
    assert metrics["drift/level"] == pytest.approx(2.0 * math.exp(-0.1 * NORMAL_QUANTILE), rel=0.1)
    assert metrics["drift/num_observations"] == drift.num_observations == 200


# Holding the factor --------------------------------------------------------------------------------------------------


def test_a_held_factor_waits_and_then_learns_everything() -> None:
    drift, twin = DriftCorrection("estimator"), DriftCorrection("estimator")
    for ratio in 2.0 * quiet_ratios(100, 0):
        drift.observe(1.0, float(ratio))
        twin.observe(1.0, float(ratio))
    before = drift.factor
    with drift.held() as factor:
        for ratio in (3.0, 1.9, 3.1):
            drift.observe(1.0, ratio)
            assert drift.factor == before == factor
        assert drift.num_observations == 100
    for ratio in (3.0, 1.9, 3.1):
        twin.observe(1.0, ratio)
    assert drift.num_observations == twin.num_observations == 103
    assert drift.metrics()["drift/level"] == twin.metrics()["drift/level"]
    assert drift.factor > before


def test_holding_for_one_request_is_not_holding() -> None:
    held, free = DriftCorrection("estimator"), DriftCorrection("estimator")
    for ratio in quiet_ratios(150, 1):
        with held.held():
            held.observe(1.0, float(ratio))
        free.observe(1.0, float(ratio))
    assert held.to_dict() == free.to_dict()


def test_requests_of_a_held_factor_are_judged_by_it() -> None:
    # In turn, the factor would rise behind the first three and forgive the others.
    drift = DriftCorrection("estimator")
    with drift.held():
        for _ in range(10):
            drift.observe(1.0, 2.0)
    assert drift.metrics()["drift/violation_rate"] == 1.0
    with drift.held(), pytest.raises(RuntimeError, match="held already"), drift.held():
        pass


@pytest.mark.parametrize("num_policies", [2, 7])
def test_rounds_keep_the_miss_rate_on_a_machine_that_changes_speed(num_policies: int) -> None:
    missed = []
    for seed in SEEDS:
        drift = DriftCorrection("estimator")
        ratios = quiet_ratios(200 * num_policies, seed).reshape(200, num_policies)
        ratios[60:120] *= 2.0
        for row in ratios:
            with drift.held() as factor:
                missed.append(row > factor)
                for ratio in row:
                    drift.observe(1.0, float(ratio))
    assert at_most_alpha(np.array(missed), 1.5 * ALPHA)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency_ms", [0, -1.0, math.nan, math.inf, "80", None, True])
def test_latencies_that_are_none_are_refused(latency_ms: Any) -> None:
    drift = DriftCorrection("estimator")
    before = drift.to_dict()
    for name, latencies_ms in (("bound_ms", (latency_ms, 1.0)), ("measured_ms", (1.0, latency_ms))):
        with pytest.raises(ProfileError, match=f"{name} is .* positive, finite number of milliseconds"):
            drift.observe(*latencies_ms)
    assert drift.to_dict() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"half_life": 0.0}, "half_life"),
        ({"half_life": math.nan}, "half_life"),
        ({"window": 2.5}, "window"),
        ({"window": 30, "min_observations": 20}, "use at least 39"),
        ({"alpha": 0.025}, "use at least 79"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": True}, "step_size"),
        ({"min_observations": 1}, "min_observations"),
        ({"min_observations": 61}, "holds only 60"),
        ({"outlier_ratio": 1.0}, "outlier_ratio"),
        ({"min_factor": 0.0}, "min_factor"),
        ({"min_factor": 1.1}, "min_factor"),
        ({"max_factor": 0.9}, "max_factor"),
        ({"max_factor": math.inf}, "max_factor"),
    ],
)
def test_settings_outside_their_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DriftSettings(**changes)


def test_unknown_kinds_and_empty_identities_are_refused() -> None:
    with pytest.raises(ConfigError, match="ttlt"):
        DriftCorrection("estimator", "ttlt")  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="fingerprint"):
        DriftCorrection("")


# Storage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guardrail(random_estimator: Callable[[np.random.Generator], LatencyEstimator]) -> Guardrail:
    calibration = Calibration(0.05, {}, 0.2, {})
    return Guardrail(random_estimator(np.random.default_rng(0)), "none", {"e2e": calibration}, calibration)


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 39, 41, 60, 61, 250])
def test_stopping_and_going_on_is_exact(guardrail: Guardrail, stopped_after: int, tmp_path: Path) -> None:
    ratios = quiet_ratios(400, 3)
    ratios[:150] *= 1.7
    ratios[300] = OUTLIER
    never_stopped = DriftCorrection.for_guardrail(guardrail)
    stopped = DriftCorrection.for_guardrail(guardrail)
    follow(ratios[:stopped_after], drift=never_stopped)
    follow(ratios[:stopped_after], drift=stopped)
    stopped.save(tmp_path / "drift.json")
    resumed = DriftCorrection.load(tmp_path / "drift.json", guardrail)
    assert resumed.factor == never_stopped.factor
    rest = ratios[stopped_after:]
    assert np.array_equal(follow(rest, drift=resumed).factors, follow(rest, drift=never_stopped).factors)
    assert resumed.to_dict() == never_stopped.to_dict()
    assert resumed.metrics() == never_stopped.metrics()


def test_bounds_are_missed_as_rarely_as_they_were_calibrated_for(guardrail: Guardrail) -> None:
    for alpha in (0.2, 0.05, 0.01):
        calibrations = {"e2e": dataclasses.replace(guardrail.calibrations["e2e"], alpha=alpha)}
        drift = DriftCorrection.for_guardrail(dataclasses.replace(guardrail, calibrations=calibrations))
        assert drift.settings == DriftSettings(alpha=alpha, window=199 if alpha == 0.01 else 60)


def test_settings_are_stored(guardrail: Guardrail, tmp_path: Path) -> None:
    settings = DriftSettings(alpha=0.1, window=30, min_observations=25, half_life=3, max_factor=4)
    DriftCorrection.for_guardrail(guardrail, settings=settings).save(tmp_path / "drift.json")
    assert DriftCorrection.load(tmp_path / "drift.json", guardrail).settings == settings


def test_other_estimators_and_kinds_are_refused(guardrail: Guardrail, tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    DriftCorrection.for_guardrail(guardrail).save(path)
    estimator = dataclasses.replace(guardrail.estimator, model_identity="another")
    other = Guardrail(estimator, "none", guardrail.calibrations, guardrail.picture)
    with pytest.raises(IdentityError, match="another latency estimator"):
        DriftCorrection.load(path, other)
    with pytest.raises(IdentityError, match="'e2e' latencies, not of 'ttft'"):
        DriftCorrection.load(path, guardrail, "ttft")
    with pytest.raises(ProfileError, match="calibrated for"):
        DriftCorrection.for_guardrail(guardrail, "ttft")
    # Another calibration of the same estimator is followed, not refused.
    recalibrated = Guardrail(guardrail.estimator, "none", {"e2e": Calibration(0.05, {}, 0.3, {})}, guardrail.picture)
    assert DriftCorrection.load(path, recalibrated).factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("state"), "keys"),
        (lambda values: values.update(extra=1), "keys"),
        (lambda values: values.update(schema_version=99), "schema version 99"),
        (lambda values: values.update(kind="latency guardrail"), "not a drift correction"),
        (lambda values: values.update(budget_kind="ttlt"), "ttlt"),
        (lambda values: values.update(budget_kind=[]), "budget_kind"),
        (lambda values: values.update(estimator_fingerprint=None), "fingerprint"),
        (lambda values: values.update(settings=3), "malformed"),
        (lambda values: values["settings"].update(alpha=2.0), "alpha is 2.0"),
        (lambda values: values["settings"].update(colour="red"), "colour"),
        (lambda values: values["settings"].update(window=50), "residuals"),
        (lambda values: values["state"].pop("level"), "keys"),
        (lambda values: values["state"].update(level="high"), "finite numbers"),
        (lambda values: values["state"].update(level=None), "finite numbers"),
        (lambda values: values["state"].update(alpha=0.5), "alpha is 0.5"),
        (lambda values: values["state"].update(residuals=7), "finite numbers"),
        (lambda values: values["state"]["residuals"].pop(), "leave 60 residuals"),
        (lambda values: values["state"]["residuals"].__setitem__(4, 50.0), "outlier_ratio"),
        (lambda values: values["state"].update(misses=[0] * 60), "true and false"),
        (lambda values: values["state"].update(misses=[True]), "60 misses"),
        (lambda values: values["state"].update(num_observations=-1), "num_observations is -1"),
        (lambda values: values["state"].update(num_early_misses=90), "num_early_misses is 90"),
    ],
)
def test_damaged_files_are_refused(
    guardrail: Guardrail,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    tmp_path: Path,
    reseal: Callable[[Path, Any], None],
) -> None:
    drift, path = DriftCorrection.for_guardrail(guardrail), tmp_path / "drift.json"
    follow(quiet_ratios(100, 0), drift=drift)
    drift.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ProfileError):  # behind its digest's back
        DriftCorrection.load(path, guardrail)
    reseal(path, values)
    with pytest.raises(ProfileError, match=message):
        DriftCorrection.load(path, guardrail)


def test_missing_and_torn_files_are_refused(guardrail: Guardrail, tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    with pytest.raises(ProfileError, match="no drift correction"):
        DriftCorrection.load(path, guardrail)
    DriftCorrection.for_guardrail(guardrail).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ProfileError, match="not valid JSON"):
        DriftCorrection.load(path, guardrail)
