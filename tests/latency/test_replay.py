"""The replayed clock: draws that follow from a request alone, and are off as the profile was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pacevlm.errors import ProfileError
from pacevlm.knobs import KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.replay import ReplayedClock


@pytest.fixture
def samples(make_device: Callable[..., Any]) -> Any:
    return make_device(noise=0.1).measure(np.random.default_rng(0), 300)


@pytest.fixture
def estimator(make_profile: Callable[..., Any], samples: Any) -> LatencyEstimator:
    return LatencyEstimator.fit(make_profile(samples), trained_top_k=8)


@pytest.mark.parametrize("kind", ["e2e", "ttft"])
def test_draws_are_what_the_measurements_were_off_by(
    estimator: LatencyEstimator, samples: Any, space: KnobSpace, kind: Any
) -> None:
    clock = ReplayedClock(estimator, samples, kind)
    measured_ms = np.array([sample.stages.covered_ms(kind) for sample in samples])
    off = measured_ms / estimator.predict_samples(samples, kind)
    drawn = [clock.ratio(f"example {i}", space[i % len(space)]) for i in range(4000)]
    assert set(drawn) <= set(off.tolist())
    np.testing.assert_allclose(np.quantile(drawn, [0.05, 0.5, 0.95]), np.quantile(off, [0.05, 0.5, 0.95]), rtol=0.03)


def test_a_draw_follows_from_example_knobs_and_seed_alone(
    estimator: LatencyEstimator, samples: Any, space: KnobSpace
) -> None:
    requests = [(f"example {i}", knobs) for i in range(20) for knobs in (space.full, space.cheapest)]
    clocks = {
        "first": ReplayedClock(estimator, samples),
        "again": ReplayedClock(estimator, samples),
        "other order": ReplayedClock(estimator, samples[::-1]),
        "other seed": ReplayedClock(estimator, samples, seed=1),
    }
    drawn = {name: [clock.ratio(*request) for request in requests] for name, clock in clocks.items()}
    backwards = [clocks["first"].ratio(*request) for request in requests[::-1]][::-1]
    assert drawn["first"] == drawn["again"] == drawn["other order"] == backwards
    assert drawn["first"] != drawn["other seed"]
    assert drawn["first"][::2] != drawn["first"][1::2]  # other knobs are another draw


def test_a_clock_needs_measurements(estimator: LatencyEstimator) -> None:
    with pytest.raises(ProfileError, match="needs the measurements of a profile"):
        ReplayedClock(estimator, ())
