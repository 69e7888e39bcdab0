"""Drift: an online correction of the guardrail's bounds, because real machines slow down and recover."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scipy.special import bdtrc

from pacevlm.artefact import MAX_MS, Text, check_keys, load_artefact, save_artefact, typed
from pacevlm.checks import check_real, check_whole
from pacevlm.config import config_from_dict, config_to_dict
from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.identity import Identity
from pacevlm.latency.conformal import check_alpha, conformal_rank
from pacevlm.latency.guardrail import Guardrail
from pacevlm.types import BudgetKind, check_budget_kind

DRIFT_KIND = "drift correction"
DRIFT_SCHEMA_VERSION = 2
# Ratios and requests beyond these say nothing, and make arithmetic overflow.
MAX_SETTING = 10**6
# A few requests are believed to show a slower machine when the profiled one would miss that often this rarely.
SLOWER_P_VALUE = 0.001

_STATE_KEYS = {"num_observations", "num_early_misses", "level", "alpha", "residuals", "misses"}


@dataclass(frozen=True)
class DriftSettings:
    """How a guardrail follows the machine.

    Attributes:
        alpha: how often a latency may exceed its corrected bound.
        half_life: requests after which a latency counts half in the level.
        window: latest requests whose residuals are kept; the transition into a slow-down is forgotten after as many.
        step_size: how strongly one miss lowers the miss rate that the next bound aims at; 0 always aims at alpha.
        min_observations: requests before the residuals are trusted more than the calibration is.
        outlier_ratio: a latency counts as at most this many times, and at least one part in so many of, its level;
            where more than `alpha` of all requests take longer than that, as many bounds are exceeded.
        min_factor: smallest correction.
        max_factor: largest correction.

    Raises:
        ConfigError: a value is outside its range.
    """

    alpha: float = 0.05
    half_life: float = 5.0
    window: int = 60
    step_size: float = 0.05
    min_observations: int = 40
    outlier_ratio: float = 3.0
    min_factor: float = 0.5
    max_factor: float = 16.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        check_whole(self, 2, MAX_SETTING, "window", "min_observations")
        check_real(self, 0, MAX_SETTING, "half_life", above=True)
        check_real(self, 0, 1, "step_size")
        check_real(self, 1, MAX_SETTING, "outlier_ratio", above=True)
        check_real(self, 0, 1, "min_factor", above=True)
        check_real(self, 1, MAX_SETTING, "max_factor")
        # The second largest residual of a shorter window is exceeded more often than alpha allows.
        if self.window + 1 < 2 / self.alpha:
            raise ConfigError(
                f"window is {self.window}, too short for alpha {self.alpha}; use at least "
                f"{math.ceil(2 / self.alpha) - 1}, or a larger alpha"
            )
        if self.min_observations > self.window:
            raise ConfigError(f"min_observations is {self.min_observations}; the window holds only {self.window}")

    @classmethod
    def for_alpha(cls, alpha: float) -> Self:
        """The defaults for another miss rate, with the window as long as that needs; raises ConfigError."""
        return cls(alpha=alpha, window=max(cls.window, math.ceil(2 / check_alpha(alpha)) - 1))


class DriftCorrection:
    """What every calibrated bound is multiplied by now, learned from the latencies of the latest requests.

    A machine that is f times slower is the profiled machine with a budget f times smaller, so one number corrects all
    configurations. With u = log(measured / bound), the next bound's shift is the level of u (an exponential average)
    plus a quantile of the residuals, which are u less the level that was known before it. The quantile aims at a miss
    rate that misses lower and quiet requests raise again. That rate stays at or below `alpha`, so that a cautious
    phase saves up no misses for later, and within what the window can tell. The largest residual is never the bound:
    one pause of a machine is no slow-down, two are.

    The level moves by at most a fixed step per request (`outlier_ratio`), and a residual is no larger than that step:
    one pause of ten times the usual latency moves bounds by some percent, and what lasts is followed all the same.

    The calibration rests on more requests than a young window. So the factor is 1 until `min_observations`, unless
    the misses of the first requests are more than the profiled machine would show (binomial test at
    `SLOWER_P_VALUE`; three of the first three are, by default), and never below 1 until the window is full.

    Method: the adapted miss rate is that of adaptive conformal inference (Gibbs and Candès, "Adaptive Conformal
    Inference Under Distribution Shift", NeurIPS 2021, section 2, equation 2), held in a range.

    Not safe to share between threads. Requests must be those of one machine that runs one at a time, as profiled.

    Args:
        estimator_fingerprint: the estimator that the bounds come from; see `for_guardrail`.
        kind: what the bounds cover.

    Raises:
        ConfigError: `kind` is unknown.
        ProfileError: the fingerprint is empty.
    """

    def __init__(
        self, estimator_fingerprint: str, kind: BudgetKind = "e2e", settings: DriftSettings | None = None
    ) -> None:
        if not isinstance(estimator_fingerprint, str) or not estimator_fingerprint:
            raise ProfileError(f"estimator_fingerprint is {estimator_fingerprint!r}; give the estimator's fingerprint")
        check_budget_kind(kind)
        self.estimator_fingerprint, self.kind = estimator_fingerprint, kind
        self.settings = DriftSettings() if settings is None else settings
        self._decay = 0.5 ** (1.0 / self.settings.half_life)
        self._log_outlier_ratio = math.log(self.settings.outlier_ratio)
        # `min`, for what rounding does to the shortest window that is allowed.
        self._min_alpha = min(2.0 / (self.settings.window + 1), self.settings.alpha)
        self._num_observations = 0
        self._num_early_misses = 0
        self._level = 0.0
        self._alpha = float(self.settings.alpha)
        self._residuals: deque[float] = deque(maxlen=self.settings.window)
        self._misses: deque[bool] = deque(maxlen=self.settings.window)
        self._factor = 1.0
        # Requests of a held factor that are still to be learned from; None while nothing is held.
        self._held: list[float] | None = None
        self._checked: Guardrail | None = None

    @classmethod
    def for_guardrail(
        cls, guardrail: Guardrail, kind: BudgetKind = "e2e", settings: DriftSettings | None = None
    ) -> Self:
        """A correction of a guardrail's bounds that has seen no request yet; raises as `check_guardrail` does.

        Args:
            settings: how to follow the machine; by default so that bounds are exceeded as rarely as they were
                calibrated for.
        """
        if settings is None and kind in guardrail.calibrations:
            settings = DriftSettings.for_alpha(guardrail.calibrations[kind].alpha)
        correction = cls(guardrail.estimator.fingerprint, kind, settings)
        correction.check_guardrail(guardrail, kind)
        return correction

    @contextmanager
    def held(self) -> Iterator[float]:
        """Keep the factor as it is for some requests, and learn from them, in their order, when they are over.

        So that several policies answer one request under one factor, whichever of them runs first.
        """
        if self._held is not None:
            raise RuntimeError("the factor is held already; end that first")
        self._held = []
        try:
            yield self._factor
        finally:
            ratios, self._held = self._held, None
            # What was known when they ran is what they are judged by.
            log_factor, level = math.log(self._factor), self._level
            for ratio in ratios:
                self._learn(ratio, log_factor, level)

    @property
    def factor(self) -> float:
        """What a calibrated bound is multiplied by to bound the next request's latency."""
        return self._factor

    @property
    def num_observations(self) -> int:
        """Requests seen so far."""
        return self._num_observations

    def check_guardrail(self, guardrail: Guardrail, kind: BudgetKind) -> None:
        """Refuse bounds that this does not correct.

        Raises:
            IdentityError: they come of another estimator or cover something else.
            ProfileError: the guardrail is not calibrated for this kind of budget.
        """
        if kind != self.kind:
            raise IdentityError(
                f"this {DRIFT_KIND} is one of {self.kind!r} latencies, not of {kind!r} ones; start anew"
            )
        if guardrail is self._checked:
            return
        if kind not in guardrail.calibrations:
            raise ProfileError(
                f"this guardrail is calibrated for {sorted(guardrail.calibrations)}, not for {kind!r} budgets"
            )
        Identity(estimator=self.estimator_fingerprint).check(f"this {DRIFT_KIND}", guardrail.estimator.made_for)
        self._checked = guardrail

    def observe(self, bound_ms: float, measured_ms: float) -> None:
        """Learn from a request that ran.

        Args:
            bound_ms: the guardrail's own bound, uncorrected, on the knobs that ran and for the output tokens that the
                answer had. A bound for the most tokens that were expected would make short answers look like a fast
                machine.
            measured_ms: wall-clock time of what the bound covers.

        Raises:
            ProfileError: a latency is not a positive, finite number; nothing is learned.
        """
        ratio = math.log(_check_latency_ms("measured_ms", measured_ms)) - math.log(
            _check_latency_ms("bound_ms", bound_ms)
        )
        if self._held is None:
            self._learn(ratio, math.log(self._factor), self._level)
        else:
            self._held.append(ratio)

    def metrics(self) -> dict[str, float]:
        """Numbers for a log.

        `drift/factor` is the correction, `drift/level` the usual measured latency over its bound, `drift/alpha` the
        miss rate that the next bound aims at, `drift/violation_rate` the share of latencies in the window that
        exceeded the corrected bound (0 before the first), `drift/num_observations` the requests seen.
        """
        return {
            "drift/factor": self._factor,
            "drift/level": math.exp(self._level),
            "drift/alpha": self._alpha,
            "drift/violation_rate": sum(self._misses) / len(self._misses) if self._misses else 0.0,
            "drift/num_observations": float(self._num_observations),
        }

    def to_dict(self) -> dict[str, Any]:
        """Settings and everything learned, ready for JSON."""
        return {
            "estimator_fingerprint": self.estimator_fingerprint,
            "budget_kind": self.kind,
            "settings": config_to_dict(self.settings),
            "state": {
                "num_observations": self._num_observations,
                "num_early_misses": self._num_early_misses,
                "level": self._level,
                "alpha": self._alpha,
                "residuals": list(self._residuals),
                "misses": list(self._misses),
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, to the bit; raises ProfileError on unknown, missing or malformed values."""
        check_keys(f"a {DRIFT_KIND}", values, {"estimator_fingerprint", "budget_kind", "settings", "state"})
        try:
            settings = config_from_dict(DriftSettings, values["settings"])
            correction = cls(
                typed(Text, values["estimator_fingerprint"], "the fingerprint"), values["budget_kind"], settings
            )
        except ConfigError as error:
            raise ProfileError(f"a {DRIFT_KIND} is malformed: {error}") from error
        correction._restore(values["state"])
        return correction

    def save(self, path: str | Path) -> None:
        """Write everything learned as JSON; raises StorageError if that fails."""
        save_artefact(path, DRIFT_KIND, DRIFT_SCHEMA_VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, guardrail: Guardrail, kind: BudgetKind = "e2e") -> Self:
        """Read what was learned with this guardrail's estimator, and go on as if never stopped.

        Raises:
            ProfileError: the file is missing, corrupt or of another schema version.
            IdentityError: it was learned with another estimator or kind of budget.
        """
        values = load_artefact(path, DRIFT_KIND, DRIFT_SCHEMA_VERSION)
        try:
            correction = cls.from_dict(values)
        except ProfileError as error:
            raise ProfileError(f"the {DRIFT_KIND} at {path} is corrupt: {error}; remove the file") from error
        correction.check_guardrail(guardrail, kind)
        return correction

    def _learn(self, ratio: float, log_factor: float, level: float) -> None:
        """Learn from log(measured / bound), given the logarithm of the factor and the level before the request."""
        settings, limit = self.settings, self._log_outlier_ratio
        missed = ratio > log_factor
        target = self._alpha + settings.step_size * (settings.alpha - missed)
        self._alpha = min(max(target, self._min_alpha), settings.alpha)
        self._misses.append(missed)
        if self._num_observations < settings.min_observations:
            self._num_early_misses += ratio > 0.0
        # The first has no level before it, but that of the calibration.
        if self._num_observations:
            self._residuals.append(min(max(ratio - level, -limit), limit))
        self._num_observations += 1
        step = min(max(ratio - self._level, -limit), limit)
        # The weights of all latencies so far sum to 1: the first is its own average, not one with the starting value.
        self._level += step * (1.0 - self._decay) / (1.0 - self._decay**self._num_observations)
        self._factor = self._next_factor()

    def _next_factor(self) -> float:
        """The correction that follows from what was learned; nothing else enters, so that resuming is exact."""
        settings, count = self.settings, self._num_observations
        if count < settings.min_observations and not self._visibly_slower():
            return 1.0
        residuals = sorted(self._residuals)
        # The second largest at most, also in a young window that is too short for alpha.
        rank = max(min(conformal_rank(len(residuals), self._alpha), len(residuals) - 1), 1)
        shift = self._level + residuals[rank - 1]
        if count <= settings.window:
            shift = max(shift, 0.0)
        # Limited before the exponential, which a machine that hangs could overflow.
        if shift >= math.log(settings.max_factor):
            return float(settings.max_factor)
        return max(math.exp(shift), float(settings.min_factor))

    def _visibly_slower(self) -> bool:
        """Whether the profiled machine would hardly ever miss as many of the first requests."""
        count, alpha = self._num_observations, self.settings.alpha
        # One request alone is no evidence, and leaves no residual.
        return count >= 2 and bool(bdtrc(self._num_early_misses - 1, count, alpha) < SLOWER_P_VALUE)

    def _restore(self, state: Any) -> None:
        check_keys(f"the state of a {DRIFT_KIND}", state, _STATE_KEYS)
        settings, count, early = self.settings, state["num_observations"], state["num_early_misses"]
        for name, value in (("num_observations", count), ("num_early_misses", early)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProfileError(f"{name} is {value!r}; it must be a whole number from 0")
        if early > min(count, settings.min_observations):
            raise ProfileError(f"num_early_misses is {early}, more than the {count} requests allow")
        residuals, misses = state["residuals"], state["misses"]
        numbers = [state["level"], state["alpha"], *(residuals if isinstance(residuals, list) else [None])]
        if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
            raise ProfileError("level, alpha and residuals must be finite numbers")
        if abs(state["level"]) > math.log(MAX_MS) - math.log(1e-6):
            raise ProfileError(f"level is {state['level']}, more than latencies can differ")
        if max(map(abs, residuals), default=0.0) > self._log_outlier_ratio:
            raise ProfileError(f"a residual exceeds what outlier_ratio {settings.outlier_ratio} allows")
        if not isinstance(misses, list) or not all(isinstance(missed, bool) for missed in misses):
            raise ProfileError("misses must be a list of true and false")
        expected = (min(max(count - 1, 0), settings.window), min(count, settings.window))
        if (len(residuals), len(misses)) != expected:
            raise ProfileError(
                f"{count} requests leave {expected[0]} residuals and {expected[1]} misses, not {len(residuals)} and "
                f"{len(misses)}"
            )
        if not self._min_alpha <= state["alpha"] <= settings.alpha:
            raise ProfileError(f"alpha is {state['alpha']}; it must lie in [{self._min_alpha}, {settings.alpha}]")
        self._num_observations, self._num_early_misses = count, early
        self._level, self._alpha = state["level"], state["alpha"]
        self._residuals.extend(residuals)
        self._misses.extend(misses)
        self._factor = self._next_factor() if count else 1.0


def _check_latency_ms(name: str, latency_ms: object) -> float:
    if (
        isinstance(latency_ms, bool)
        or not isinstance(latency_ms, (int, float))
        or not math.isfinite(latency_ms)
        or latency_ms <= 0
    ):
        raise ProfileError(f"{name} is {latency_ms!r}; it must be a positive, finite number of milliseconds")
    return float(latency_ms)
