"""From a profile to an estimator and its guardrail, with an honest account of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pacevlm.errors import ConfigError, ProfileError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.latency.conformal import check_alpha, min_num_scores
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import GroupBy, Guardrail
from pacevlm.latency.profile import Profile, Sample


class SampleSplit(NamedTuple):
    """Samples of different requests."""

    fit: tuple[Sample, ...]
    calibration: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class FitReport:
    """How well a profile was fitted, all on requests that the fit did not see.

    Attributes:
        num_fit, num_calibration: samples of each part.
        mape_e2e: mean absolute relative error of end-to-end predictions, output lengths known.
        ape_p50, ape_p95: median and 95th percentile of the same.
        noise_cv: coefficient of variation of one request that never changed; no estimator can do better.
        alpha: how often a latency may exceed its bound.
        coverage: share of latencies within their bound, where one half of the calibration requests bounded the other,
            and the reverse; None where a half is too small for this alpha.
    """

    num_fit: int
    num_calibration: int
    mape_e2e: float
    ape_p50: float
    ape_p95: float
    noise_cv: float
    alpha: float
    coverage: float | None


class LatencyFit(NamedTuple):
    """What `fit_latency` gives."""

    estimator: LatencyEstimator
    guardrail: Guardrail
    report: FitReport


def split_samples(samples: Sequence[Sample], calibration_share: float = 0.5, seed: int = 0) -> SampleSplit:
    """Divide samples at random so that no request is in both parts.

    Samples with the same text tokens and pixels count as one request: at worst this keeps two alike ones together.

    Raises:
        ConfigError: the share does not lie strictly between 0 and 1.
        ProfileError: fewer than two requests were measured.
    """
    if not 0.0 < calibration_share < 1.0:
        raise ConfigError(f"calibration_share is {calibration_share!r}; it must lie strictly between 0 and 1")
    keys = sorted({_request_key(sample) for sample in samples})
    if len(keys) < 2:
        raise ProfileError(
            f"the profile has {len(keys)} distinct requests, but fitting and calibrating need different ones; "
            "measure images and questions of more than one size"
        )
    num_wanted = calibration_share * len(samples)
    counts = {key: 0 for key in keys}
    for sample in samples:
        counts[_request_key(sample)] += 1
    chosen: set[tuple[int, int]] = set()
    num_chosen = 0
    for place in np.random.default_rng(seed).permutation(len(keys))[:-1]:
        if num_chosen and num_chosen + counts[keys[place]] / 2 > num_wanted:
            continue
        chosen.add(keys[place])
        num_chosen += counts[keys[place]]
    return SampleSplit(
        fit=tuple(sample for sample in samples if _request_key(sample) not in chosen),
        calibration=tuple(sample for sample in samples if _request_key(sample) in chosen),
    )


def split_pictures(samples: Sequence[Sample], seed: int = 0) -> SampleSplit:
    """Divide samples of self-made pictures so that of every two alike in kind and size one is in each part.

    Both parts then reach from the smallest to the largest picture of every kind.
    """
    keys = sorted({_picture_key(sample) for sample in samples})
    rng = np.random.default_rng(seed)
    fitted = {keys[place + int(rng.integers(2))] for place in range(0, len(keys) - 1, 2)}
    return SampleSplit(
        fit=tuple(sample for sample in samples if _picture_key(sample) in fitted),
        calibration=tuple(sample for sample in samples if _picture_key(sample) not in fitted),
    )


def fit_latency(
    profile: Profile,
    *,
    trained_top_k: int,
    stage2_after: int = 1,
    alpha: float = 0.05,
    group_by: GroupBy = "tier",
    calibration_share: float = 0.5,
    seed: int = 0,
    wanted: Identity = ANYTHING,
    transfer_from: LatencyEstimator | None = None,
) -> LatencyFit:
    """Fit an estimator to one part of a profile, calibrate its guardrail on the other, and report on both.

    Args:
        wanted: what the profile has to be of.
        transfer_from: an estimator of another device, thread count or dtype to carry over with few samples, instead
            of fitting all coefficients.

    Raises:
        IdentityError: the profile is of another model, knob space or device.
        ConfigError: alpha, the grouping or the share is outside its range.
        ProfileError: the profile holds too few samples or requests, or leaves out an end of a knob.
    """
    alpha = check_alpha(alpha)
    profile.made_for.check("the profile", wanted)
    split = split_samples(profile.samples, calibration_share, seed)
    pictures = split_pictures(profile.picture_samples, seed)
    fit_part = dataclasses.replace(profile, samples=split.fit, picture_samples=pictures.fit)
    if transfer_from is None:
        estimator = LatencyEstimator.fit(fit_part, trained_top_k=trained_top_k, stage2_after=stage2_after)
    else:
        estimator = transfer_from.transfer(fit_part)
    estimator = estimator.reaching(profile.all_samples)
    held_out = split.calibration + pictures.calibration
    guardrail = Guardrail.from_samples(estimator, held_out, alpha, group_by)
    measured_ms = np.array([sample.stages.e2e_ms for sample in held_out])
    errors = np.abs(estimator.predict_samples(held_out) - measured_ms) / measured_ms
    report = FitReport(
        num_fit=len(fit_part.all_samples),
        num_calibration=len(held_out),
        mape_e2e=float(errors.mean()),
        ape_p50=float(np.quantile(errors, 0.5)),
        ape_p95=float(np.quantile(errors, 0.95)),
        noise_cv=profile.noise_floor.cv,
        alpha=alpha,
        coverage=_cross_coverage(estimator, held_out, alpha, group_by, seed),
    )
    return LatencyFit(estimator, guardrail, report)


def coverage(guardrail: Guardrail, samples: Sequence[Sample]) -> float:
    """Share of requests whose end-to-end latency keeps its bound, output lengths known; NaN without samples."""
    if not samples:
        return float("nan")
    measured_ms = np.array([sample.stages.e2e_ms for sample in samples])
    return float(np.mean(measured_ms <= guardrail.bound_samples_ms(samples)))


def full_p50_ms(profile: Profile) -> float:
    """Median end-to-end milliseconds of the full configuration: the budget that fractions count from.

    Raises:
        ProfileError: the profile has no sample of the full configuration.
    """
    full = profile.knob_space.full
    times_ms = [sample.stages.e2e_ms for sample in profile.samples if sample.knobs == full]
    if not times_ms:
        raise ProfileError(f"the profile has no sample of the full configuration {full}; measure it")
    return float(np.median(times_ms))


def _request_key(sample: Sample) -> tuple[int, int]:
    return sample.num_text_tokens, sample.num_pixels


def _picture_key(sample: Sample) -> tuple[str, int, int, int]:
    return sample.picture_kind, sample.num_pixels, sample.num_bytes, sample.num_text_tokens


def _cross_coverage(
    estimator: LatencyEstimator, samples: Sequence[Sample], alpha: float, group_by: GroupBy, seed: int
) -> float | None:
    try:
        first, second = split_samples(samples, 0.5, seed)
    except ProfileError:  # a single request: there is nothing to hold out
        return None
    if min(len(first), len(second)) < min_num_scores(alpha):
        return None
    covered = [
        coverage(Guardrail.from_samples(estimator, bounding, alpha, group_by), held_out) * len(held_out)
        for bounding, held_out in ((first, second), (second, first))
    ]
    return sum(covered) / len(samples)
