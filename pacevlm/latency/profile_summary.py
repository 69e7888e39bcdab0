"""What a profile says of its own quality: percentiles, repeatability, and whether the stages add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pacevlm.knobs import Knobs
from pacevlm.latency.profile import Profile, Sample
from pacevlm.latency.profiler import noisy_windows
from pacevlm.types import StageTimes

STAGES = ("read_ms", "prepare_ms", "stage1_ms", "vision_ms", "first_block_ms", "prefill_ms", "decode_ms")


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    """A profile in a few numbers.

    Attributes:
        full_ms, cheapest_ms: end-to-end percentiles of the full and the cheapest configuration, by name
            (`p50`, `p95`, `p99`), over requests of all sizes.
        repeat_cv: median coefficient of variation of one (request, knobs) point that was measured again and again;
            None where no point was.
        noise_cv: the same of the reference request, over the whole run.
        stage_sum_ratio: mean of the stages' sum over the end-to-end time.
        stage_sum_ratio_min, stage_sum_ratio_max: its extremes.
        num_noisy_windows: windows between two reference requests of which either was slow, reruns done.
    """

    full_ms: dict[str, float]
    cheapest_ms: dict[str, float]
    repeat_cv: float | None
    noise_cv: float
    stage_sum_ratio: float
    stage_sum_ratio_min: float
    stage_sum_ratio_max: float
    num_noisy_windows: int


def stage_sums_ms(times: StageTimes) -> dict[str, float]:
    """Milliseconds of every stage of one request, all decoded tokens together."""
    return {stage: sum(times.decode_ms) if stage == "decode_ms" else getattr(times, stage) for stage in STAGES}


def summarise_profile(profile: Profile) -> ProfileSummary:
    """Summarise a profile."""
    ratios = np.array(
        [sum(stage_sums_ms(sample.stages).values()) / sample.stages.e2e_ms for sample in profile.all_samples]
    )
    return ProfileSummary(
        full_ms=_percentiles_ms(profile.samples, profile.knob_space.full),
        cheapest_ms=_percentiles_ms(profile.samples, profile.knob_space.cheapest),
        repeat_cv=_repeat_cv(profile.samples),
        noise_cv=profile.noise_floor.cv,
        stage_sum_ratio=float(ratios.mean()),
        stage_sum_ratio_min=float(ratios.min()),
        stage_sum_ratio_max=float(ratios.max()),
        num_noisy_windows=len(noisy_windows(profile.noise_floor)),
    )


def _percentiles_ms(samples: Sequence[Sample], knobs: Knobs) -> dict[str, float]:
    times_ms = [sample.stages.e2e_ms for sample in samples if sample.knobs == knobs]
    if not times_ms:
        return {}
    return {f"p{q}": float(np.percentile(times_ms, q)) for q in (50, 95, 99)}


def _repeat_cv(samples: Sequence[Sample]) -> float | None:
    points: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for sample in samples:
        sizes = (sample.num_image_tokens, sample.num_text_tokens, sample.num_pixels, sample.num_output_tokens)
        points[sample.knobs, *sizes].append(sample.stages.e2e_ms)
    variations = [np.std(values, ddof=1) / np.mean(values) for values in points.values() if len(values) > 1]
    return float(np.median(variations)) if variations else None
