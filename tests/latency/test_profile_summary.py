"""A profile's summary: stages add up, repeats repeat, noise is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pacevlm.latency.profile import NoiseFloor, Profile
from pacevlm.latency.profile_summary import stage_sums_ms, summarise_profile


def test_a_summary_tells_what_was_put_in(make_device: Any, make_profile: Callable[..., Profile]) -> None:
    samples = make_device().measure(np.random.default_rng(0), 60)
    doubled = tuple(
        dataclasses.replace(s, stages=dataclasses.replace(s.stages, e2e_ms=1.1 * s.stages.e2e_ms)) for s in samples
    )
    profile = make_profile((*samples, *doubled))
    noise_floor = NoiseFloor(profile.knob_space.full, (10.0, 10.1, 14.0, 10.0))
    summary = summarise_profile(dataclasses.replace(profile, noise_floor=noise_floor))
    # Two repeats of which one is a tenth slower differ by 0.1 / sqrt(2) around 1.05.
    assert summary.repeat_cv == pytest.approx(0.1 / 2**0.5 / 1.05)
    assert summary.num_noisy_windows == 2
    assert summary.noise_cv == noise_floor.cv
    assert summary.stage_sum_ratio_min <= summary.stage_sum_ratio <= summary.stage_sum_ratio_max <= 1.0
    full = [s.stages.e2e_ms for s in profile.samples if s.knobs == profile.knob_space.full]
    assert summary.full_ms["p50"] == pytest.approx(float(np.median(full)))
    assert set(summary.cheapest_ms) == {"p50", "p95", "p99"}


def test_stages_hold_everything_but_the_overhead(make_device: Any) -> None:
    for sample in make_device().measure(np.random.default_rng(1), 20):
        assert sum(stage_sums_ms(sample.stages).values()) == pytest.approx(sample.stages.e2e_ms - 0.25)


def test_single_measurements_have_no_repeatability(make_device: Any, make_profile: Callable[..., Profile]) -> None:
    assert summarise_profile(make_profile(make_device().measure(np.random.default_rng(2), 8))).repeat_cv is None
