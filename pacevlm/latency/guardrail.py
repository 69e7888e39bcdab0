"""The guardrail: the estimator's calibrated upper bound, turned into a mask over knobs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.artefact import Count, Text, load_artefact, save_artefact, shown, typed
from pacevlm.errors import ConfigError, ProfileError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.conformal import check_alpha, conformal_quantile, min_num_scores
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.profile import Sample
from pacevlm.types import BudgetKind, RequestSizes, check_budget_kind

GUARDRAIL_SCHEMA_VERSION = 2
# No request takes a hundredth of its prediction; one that a machine pauses may take thousands of times as long.
MIN_LOG_MARGIN, MAX_LOG_MARGIN = math.log(1e-2), math.log(1e4)

# What the picture's part is calibrated on. In small pictures it takes a millisecond, which a pause of the machine makes
# many times as much; it would say nothing of large ones.
LARGE_PIXELS = 1_000_000

GroupBy = Literal["none", "tier", "top_k", "num_blocks", "knobs"]

Array = NDArray[np.float64]


def group_of(knobs: Knobs, group_by: GroupBy) -> str:
    """Name of the calibration group that a configuration belongs to; raises ConfigError on an unknown grouping."""
    if group_by not in get_args(GroupBy):
        raise ConfigError(f"group_by is {group_by!r}; use one of {get_args(GroupBy)}")
    if group_by == "none":
        return "all"
    return str(knobs) if group_by == "knobs" else str(getattr(knobs, group_by))


@dataclass(frozen=True)
class Calibration:
    """Upper bounds on log(measured / predicted), one per group.

    Attributes:
        alpha: how often a latency may exceed its bound.
        log_margins: the bound of each group that had enough samples; below 0 where predictions are too high.
        fallback_log_margin: the bound of every other group.
        num_samples: samples of each group that was seen, those with too few included.

    Raises:
        ProfileError: a margin says that requests take less than a hundredth, or more than 10,000 times, of what is
            predicted, or is not finite.
    """

    alpha: float
    log_margins: Mapping[str, float]
    fallback_log_margin: float
    num_samples: Mapping[str, Count]

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        margins = {**self.log_margins, "others": self.fallback_log_margin}
        if not all(MIN_LOG_MARGIN <= margin <= MAX_LOG_MARGIN for margin in margins.values()):
            raise ProfileError(
                f"a calibration has the log margins {shown(margins)}; they must be finite and lie in "
                f"{MIN_LOG_MARGIN:.1f}..{MAX_LOG_MARGIN:.1f}"
            )

    def factor(self, group: str) -> float:
        """What a prediction of this group is multiplied by to bound the latency from above."""
        return math.exp(self.log_margins.get(group, self.fallback_log_margin))

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "alpha": self.alpha,
            "log_margins": dict(self.log_margins),
            "fallback_log_margin": self.fallback_log_margin,
            "num_samples": dict(self.num_samples),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed values."""
        calibration: Calibration = typed(cls, values, "a calibration")
        return calibration


def calibrate(predicted_ms: ArrayLike, measured_ms: ArrayLike, groups: Sequence[str], alpha: float) -> Calibration:
    """Bound log(measured / predicted) from above in every group by one-sided split conformal prediction.

    In a group with enough samples a new exchangeable request exceeds its bound with probability at most alpha. A
    group with too few, or none, gets the largest value of all samples, which is at least as cautious as any of them.
    The samples must not be those that the estimator was fitted to.

    Method: Mondrian conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World",
    2005, section 4.5).

    Args:
        predicted_ms: shape `(n,)`, with the knobs and output lengths that the requests had.
        measured_ms: shape `(n,)`.
        groups: one name per sample.

    Raises:
        ConfigError: alpha does not lie strictly between 0 and 1.
        ProfileError: shapes differ, a latency is not positive and finite, or all samples together are too few.
    """
    alpha = check_alpha(alpha)
    predicted, measured = np.asarray(predicted_ms, np.float64), np.asarray(measured_ms, np.float64)
    if predicted.ndim != 1 or predicted.shape != measured.shape or len(groups) != len(predicted):
        raise ProfileError(
            f"predicted_ms {predicted.shape}, measured_ms {measured.shape} and {len(groups)} groups must agree"
        )
    if not all((np.isfinite(values) & (values > 0)).all() for values in (predicted, measured)):
        raise ProfileError("predicted and measured latencies must be positive, finite numbers of milliseconds")
    needed = min_num_scores(alpha)
    if len(measured) < needed:
        raise ProfileError(f"{len(measured)} samples are too few for alpha {alpha}; measure at least {needed}")
    scores = np.log(measured) - np.log(predicted)
    names = np.array(groups, dtype=np.str_)
    log_margins: dict[str, float] = {}
    num_samples: dict[str, int] = {}
    for group in sorted(set(groups)):
        group_scores = scores[names == group]
        num_samples[group] = len(group_scores)
        margin = conformal_quantile(group_scores, alpha)
        if margin is not None:
            log_margins[group] = margin
    return Calibration(alpha, log_margins, float(scores.max()), num_samples)


class Feasibility(NamedTuple):
    """Which knobs keep the budgets of several requests.

    Attributes:
        mask: boolean, `(batch, tiers, top_ks, num_blocks)`; only the cheapest knobs where nothing is feasible.
        any_feasible: False where nothing is feasible, `(batch,)`.
    """

    mask: NDArray[np.bool_]
    any_feasible: NDArray[np.bool_]


def feasible_knobs(bounds_ms: Array, budgets_ms: ArrayLike) -> Feasibility:
    """Say which configurations keep each request's own budget.

    Args:
        bounds_ms: as `Guardrail.upper_bounds_many_ms` gives them, `(batch, tiers, top_ks, num_blocks)`.
        budgets_ms: `(batch,)`.

    Raises:
        ProfileError: bounds and budgets differ in number.
    """
    budgets = np.asarray(budgets_ms, np.float64)
    if budgets.shape != bounds_ms.shape[:1]:
        raise ProfileError(f"{len(bounds_ms)} requests need {len(bounds_ms)} budgets, not shape {budgets.shape}")
    mask = (budgets >= bounds_ms.T).T
    any_feasible: NDArray[np.bool_] = np.asarray(mask.any(axis=tuple(range(1, mask.ndim))))
    cheapest = np.zeros(mask.shape[1:], bool)
    cheapest.flat[0] = True
    mask[~any_feasible] = cheapest
    return Feasibility(mask, any_feasible)


class _Stored(TypedDict):
    """What a guardrail's file holds."""

    model_identity: Text
    knob_space: KnobSpace
    estimator_fingerprint: Text
    group_by: GroupBy
    calibrations: dict[BudgetKind, Calibration]
    picture: Calibration


@dataclass(frozen=True)
class Guardrail:
    """Calibrated upper bounds of one estimator, and the masks that they make.

    A bound is a sum: what reading and preparing the picture is predicted to take, times one factor, and what the rest
    is predicted to take, times a factor for the knobs. The first comes from the profile, which times large pictures of
    all kinds; the others may be calibrated again on requests with any pictures, because what a picture takes beyond its
    own bound counts there. So a request like those that calibrated the rest exceeds its bound with probability at most
    alpha, and one whose picture is only like the profile's large ones with at most twice alpha. Beyond what was
    profiled every bound is infinite.

    Bounds never fall when a knob grows: where the calibration of groups would let a cheaper configuration have the
    higher bound, the dearer one gets it too. So whatever is cheaper than a feasible configuration is feasible.

    Attributes:
        group_by: which knobs share a calibration.
        calibrations: of the rest, one per budget kind that can be asked for.
        picture: of reading and preparing, one group.

    Raises:
        ConfigError: the grouping or a budget kind is unknown.
        ProfileError: there is no calibration, or one names a group that the knob space does not have.
    """

    estimator: LatencyEstimator
    group_by: GroupBy
    calibrations: Mapping[BudgetKind, Calibration]
    picture: Calibration
    _factors: dict[str, Array] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.calibrations:
            raise ProfileError("a guardrail needs the calibration of at least one budget kind")
        space = self.estimator.knob_space
        groups = [group_of(knobs, self.group_by) for knobs in space]
        factors = {}
        for kind, calibration in self.calibrations.items():
            check_budget_kind(kind)
            unknown = sorted({*calibration.log_margins, *calibration.num_samples} - set(groups))
            if unknown:
                raise ProfileError(f"the calibration of {kind!r} names the groups {shown(unknown)}, but there are none")
            factors[kind] = np.array([calibration.factor(group) for group in groups]).reshape(space.shape)
        object.__setattr__(self, "_factors", factors)

    @classmethod
    def from_samples(
        cls,
        estimator: LatencyEstimator,
        samples: Sequence[Sample],
        alpha: float,
        group_by: GroupBy = "tier",
        picture: Calibration | None = None,
    ) -> Guardrail:
        """Calibrate both budget kinds on measured requests that the estimator was not fitted to.

        Args:
            picture: how far reading and preparing were bounded before; calibrated on the same samples if None.

        Raises as `calibrate` does.
        """
        predicted_ms = estimator.split_samples_ms(samples).picture
        picture_ms = np.array([sample.stages.read_ms + sample.stages.prepare_ms for sample in samples])
        if picture is None:
            pixels = np.array([sample.num_pixels for sample in samples])
            num_large = max(int(np.sum(pixels > LARGE_PIXELS)), min_num_scores(check_alpha(alpha)))
            large = np.argsort(-pixels, kind="stable")[:num_large]
            picture = calibrate(predicted_ms[large], picture_ms[large], ["all"] * len(large), alpha)
        # What exceeds the picture's own bound has to fit the rest's.
        covered_ms = np.minimum(picture_ms, predicted_ms * picture.factor("all"))
        groups = [group_of(sample.knobs, group_by) for sample in samples]
        measured_ms: dict[BudgetKind, list[float]] = {
            "e2e": [sample.stages.e2e_ms for sample in samples],
            "ttft": [sample.stages.ttft_ms for sample in samples],
        }
        calibrations = {
            kind: calibrate(estimator.split_samples_ms(samples, kind).rest, measured - covered_ms, groups, alpha)
            for kind, measured in measured_ms.items()
        }
        return cls(estimator, group_by, calibrations, picture)

    def with_margin(self, margin: float) -> Guardrail:
        """The same with bounds of so many times the predictions, as a machine with little noise would have them."""
        flat = Calibration(self.picture.alpha, {}, math.log(margin), {})
        return replace(self, calibrations=dict.fromkeys(self.calibrations, flat), picture=flat)

    def bound_samples_ms(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """Bound measured requests with the knobs and output lengths they had, `(samples,)`, each by its own groups."""
        picture_ms, rest_ms = self.estimator.split_samples_ms(samples, kind)
        calibration = self._calibration(kind)
        factors = np.array([calibration.factor(group_of(sample.knobs, self.group_by)) for sample in samples])
        return np.asarray(picture_ms * self.picture.factor("all") + rest_ms * factors)

    def upper_bounds_ms(self, sizes: RequestSizes, num_output_tokens_upper: int, kind: BudgetKind = "e2e") -> Array:
        """Bound one request's latency under every configuration, shape `(tiers, top_ks, num_blocks)`, milliseconds.

        All are infinite for a request beyond what was profiled; `LatencyEstimator.beyond` says what of it is.

        Args:
            num_output_tokens_upper: bound on the output tokens, for example from `OutputLengthModel.upper`. If it is
                exceeded with probability β, a latency exceeds its bound with probability at most alpha + β.

        Raises:
            ConfigError: `kind` is unknown.
            ProfileError: this kind is not calibrated, or the sizes do not fit the knob space.
        """
        bounds_ms: Array = self.upper_bounds_many_ms([sizes], [num_output_tokens_upper], kind)[0]
        return bounds_ms

    def upper_bounds_many_ms(
        self, sizes: Sequence[RequestSizes], num_output_tokens_upper: ArrayLike, kind: BudgetKind = "e2e"
    ) -> Array:
        """Bound several requests, shape `(batch, tiers, top_ks, num_blocks)`; raises as `upper_bounds_ms` does."""
        picture_ms, rest_ms = self.estimator.split_many_ms(sizes, num_output_tokens_upper, kind)
        self._calibration(kind)
        bounds_ms = (picture_ms * self.picture.factor("all"))[..., None, None] + rest_ms * self._factors[kind]
        for axis in (1, 2, 3):
            bounds_ms = np.maximum.accumulate(bounds_ms, axis=axis)
        bounds_ms[[self.estimator.beyond(request) is not None for request in sizes]] = np.inf
        return np.asarray(bounds_ms)

    def _calibration(self, kind: BudgetKind) -> Calibration:
        if kind not in self.calibrations:
            raise ProfileError(f"this guardrail is calibrated for {sorted(self._factors)}, not for {kind!r} budgets")
        return self.calibrations[kind]

    def to_dict(self) -> dict[str, Any]:
        """All that bounds depend on, ready for JSON; the estimator by its fingerprint alone."""
        return {
            "model_identity": self.estimator.model_identity,
            "knob_space": self.estimator.knob_space.to_dict(),
            "estimator_fingerprint": self.estimator.fingerprint,
            "group_by": self.group_by,
            "calibrations": {kind: calibration.to_dict() for kind, calibration in self.calibrations.items()},
            "picture": self.picture.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; raises StorageError if that fails."""
        save_artefact(path, "latency guardrail", GUARDRAIL_SCHEMA_VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, estimator: LatencyEstimator) -> Guardrail:
        """Read a guardrail that was calibrated for this very estimator.

        Raises:
            ProfileError: the file is missing, corrupt or of another schema version.
            IdentityError: it was calibrated for another model, knob space or estimator.
        """
        values = load_artefact(path, "latency guardrail", GUARDRAIL_SCHEMA_VERSION)
        try:
            stored = typed(_Stored, values, "a guardrail")
            made_for = Identity(stored["model_identity"], stored["knob_space"], stored["estimator_fingerprint"])
            made_for.check(f"the guardrail at {path}", estimator.made_for)
            guardrail = cls(estimator, stored["group_by"], stored["calibrations"], stored["picture"])
        except (ConfigError, ProfileError) as error:
            raise ProfileError(f"the latency guardrail at {path} is corrupt: {error}; calibrate anew") from error
        return guardrail
