"""The latency estimator: a physical model of each stage of a request, fitted to a profile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.artefact import MAX_MS, Text, check_keys, load_artefact, save_artefact, typed
from pacevlm.errors import ConfigError, KnobError, ProfileError
from pacevlm.knobs import MAX_VALUE, Knobs, KnobSpace
from pacevlm.latency.profile import DeviceFacts, Profile, Sample, check_identity, load_knob_space
from pacevlm.latency.stage_fit import StageFit, fit_stage
from pacevlm.types import BudgetKind, RequestSizes, VisionSizes

ESTIMATOR_SCHEMA_VERSION = 5

Array = NDArray[np.float64]

# What each stage's time is a non-negative sum of. `later_blocks` are the blocks after the latency token's,
# `whole_blocks` those of them that the prefill runs for every token: all but the last, of which only the prompt's last
# token is wanted. `experts` counts the experts one token passes through in all blocks.
STAGE_TERMS: dict[str, tuple[str, ...]] = {
    "prepare_ms": ("constant", "crops", "pixels"),
    "stage1_ms": ("constant",),
    "vision_ms": ("constant", "crops"),
    "first_block_ms": ("constant", "tokens", "tokens^2"),
    "prefill_ms": (
        "constant",
        "later_blocks",
        "later_blocks*tokens",
        "whole_blocks*tokens^2",
        "whole_blocks*tokens*top_k",
        "later_blocks*top_k",
    ),
    "decode_ms_per_token": ("constant", "blocks", "blocks*context", "experts"),
    # What passes between the stages: end to end less the sum of the stages.
    "overhead_ms": ("constant",),
}


# Terms of these grow with the work of a request; the others are what every block or stage costs anyway. A faster or
# slower device changes the two by different factors.
WORK_UNITS = ("tokens", "crops", "pixels", "context", "experts")


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """Predicted milliseconds of one request's stages; `decode_ms` is the sum over all tokens after the first."""

    prepare_ms: float
    stage1_ms: float
    vision_ms: float
    first_block_ms: float
    prefill_ms: float
    decode_ms: float
    overhead_ms: float

    @property
    def ttft_ms(self) -> float:
        """Time to the first token, in milliseconds."""
        return (
            self.prepare_ms + self.stage1_ms + self.vision_ms + self.first_block_ms + self.prefill_ms + self.overhead_ms
        )

    @property
    def e2e_ms(self) -> float:
        """Time to the last token, in milliseconds."""
        return self.ttft_ms + self.decode_ms


@dataclass(frozen=True)
class LatencyEstimator:
    """Predicts a request's latency from its sizes, knobs and output length.

    Every coefficient is non-negative, so a prediction never falls when a knob, a size or the output length grows.

    Attributes:
        trained_top_k: experts per token that the model was trained with; blocks before
            stage 2 use it always.
        stage2_after: number of leading blocks that always run, at `trained_top_k`.
        stages: for every stage of `STAGE_TERMS` its coefficients in milliseconds per unit of each term, and its
            fit quality.

    Raises:
        ProfileError: a stage is missing, or a coefficient is negative, not finite or one too many.
        KnobError: the knob space runs fewer blocks than `stage2_after`.
    """

    model_identity: str
    knob_space: KnobSpace
    device: DeviceFacts
    trained_top_k: int
    stage2_after: int
    stages: Mapping[str, StageFit]
    _later_blocks: Array = field(init=False, repr=False, compare=False)
    _whole_blocks: Array = field(init=False, repr=False, compare=False)
    _top_ks: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("trained_top_k", self.trained_top_k), ("stage2_after", self.stage2_after)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_VALUE:
                raise ProfileError(f"{name} is {value!r}; it must be a whole number in 1..{MAX_VALUE}")
        if self.knob_space.num_blocks[0] < self.stage2_after:
            raise KnobError(
                f"num_blocks {self.knob_space.num_blocks[0]} is below stage2_after {self.stage2_after}, "
                "the number of blocks that always run"
            )
        check_keys("the estimator's stages", self.stages, set(STAGE_TERMS))
        for stage, terms in STAGE_TERMS.items():
            coefficients = np.asarray(self.stages[stage].coefficients)
            if len(coefficients) != len(terms) or not ((coefficients >= 0) & (coefficients <= MAX_MS)).all():
                raise ProfileError(
                    f"stage {stage} has the coefficients {self.stages[stage].coefficients}; "
                    f"it needs {len(terms)} finite numbers from 0 to {MAX_MS:g}"
                )
        later_blocks = np.array(self.knob_space.num_blocks, dtype=np.float64) - self.stage2_after
        object.__setattr__(self, "_later_blocks", later_blocks)
        object.__setattr__(self, "_whole_blocks", np.maximum(later_blocks - 1.0, 0.0))
        object.__setattr__(self, "_top_ks", np.array(self.knob_space.top_ks, dtype=np.float64)[:, None])
        smallest = RequestSizes((VisionSizes(0, 0),) * len(self.knob_space.tiers), 1, 1)
        if not self.predict_all(smallest, 1, "ttft").min() > 0:
            raise ProfileError("the coefficients predict 0 ms for a small request; no request takes no time")

    @classmethod
    def fit(cls, profile: Profile, *, trained_top_k: int, stage2_after: int = 1) -> LatencyEstimator:
        """Fit every stage to a profile by non-negative least squares on the relative error (see `fit_stage`).

        Raises:
            ProfileError: the profile leaves out the lowest or highest value of a knob or has no decoded token, so
                that predictions would be extrapolated.
        """
        samples = profile.samples
        for name in ("tier", "top_k", "num_blocks"):
            values = profile.knob_space.tiers if name == "tier" else getattr(profile.knob_space, _PLURAL[name])
            measured = {getattr(sample.knobs, name) for sample in samples}
            missing = [value for value in dict.fromkeys((values[0], values[-1])) if value not in measured]
            if missing:
                raise ProfileError(f"the profile has no sample with {name} {missing}; measure them and fit again")
        _check_decoded(samples)
        terms = _stage_terms(samples, trained_top_k, stage2_after)
        measured_ms = _measured_stages(samples)
        stages = {}
        for stage in STAGE_TERMS:
            # A request with a single output token says nothing about decoding.
            rows = np.isfinite(measured_ms[stage])
            stages[stage] = fit_stage(terms[stage][rows], measured_ms[stage][rows])
        return cls(profile.model_identity, profile.knob_space, profile.device, trained_top_k, stage2_after, stages)

    def transfer(self, profile: Profile) -> LatencyEstimator:
        """This estimator carried over to the device of another profile of the same model, from as few as 25 samples.

        Of every stage two factors are fitted, one for the terms that grow with the work (`WORK_UNITS`) and one for the
        others, by the same robust non-negative least squares that fits all coefficients otherwise.

        Raises:
            IdentityError: the profile is of another model or knob space.
            ProfileError: no sample has more than one output token.
        """
        check_identity(profile, model_identity=self.model_identity, knob_space=self.knob_space)
        _check_decoded(profile.samples)
        terms = _stage_terms(profile.samples, self.trained_top_k, self.stage2_after)
        measured_ms = _measured_stages(profile.samples)
        stages = {}
        for stage, names in STAGE_TERMS.items():
            rows = np.isfinite(measured_ms[stage])
            is_work = np.array([any(unit in name for unit in WORK_UNITS) for name in names])
            old = self._coefficients(stage)
            parts = np.stack([terms[stage][rows] @ (old * is_work), terms[stage][rows] @ (old * ~is_work)], axis=1)
            fit = fit_stage(parts, measured_ms[stage][rows])
            new = old * np.where(is_work, *fit.coefficients)
            stages[stage] = replace(fit, coefficients=tuple(new.tolist()))
        return LatencyEstimator(
            self.model_identity, self.knob_space, profile.device, self.trained_top_k, self.stage2_after, stages
        )

    def predict(self, sizes: RequestSizes, knobs: Knobs, num_output_tokens: int) -> StagePrediction:
        """Predict the stages of one request with one configuration.

        Raises:
            KnobError: the knobs are not in the knob space.
            ProfileError: the sizes have another number of tiers, or there is no output token.
        """
        self.knob_space.index(knobs)
        self._check_requests([sizes], np.array([num_output_tokens]))
        vision = sizes.vision[self.knob_space.tiers.index(knobs.tier)]
        terms = _terms_of(
            crops=np.array([vision.num_crops], dtype=np.float64),
            tokens=np.array([vision.num_image_tokens + sizes.num_text_tokens], dtype=np.float64),
            pixels=np.array([sizes.num_pixels], dtype=np.float64),
            top_k=np.array([knobs.top_k], dtype=np.float64),
            num_blocks=np.array([knobs.num_blocks], dtype=np.float64),
            steps=np.array([num_output_tokens - 1], dtype=np.float64),
            trained_top_k=self.trained_top_k,
            stage2_after=self.stage2_after,
        )
        stage_ms = {stage: float((terms[stage] @ self._coefficients(stage))[0]) for stage in STAGE_TERMS}
        decode_ms = stage_ms.pop("decode_ms_per_token") * (num_output_tokens - 1)
        return StagePrediction(**stage_ms, decode_ms=decode_ms)

    def predict_samples(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """Predict measured requests with the knobs and output lengths they had, shape `(samples,)`, milliseconds."""
        _check_kind(kind)
        terms = _stage_terms(samples, self.trained_top_k, self.stage2_after)
        total_ms = np.zeros(len(samples))
        for stage in STAGE_TERMS:
            stage_ms: Array = terms[stage] @ self._coefficients(stage)
            if stage == "decode_ms_per_token":
                steps = np.array([sample.num_output_tokens - 1 for sample in samples], dtype=np.float64)
                stage_ms = stage_ms * steps if kind == "e2e" else np.zeros(len(samples))
            total_ms += stage_ms
        return total_ms

    def predict_all(self, sizes: RequestSizes, num_output_tokens: int, kind: BudgetKind = "e2e") -> Array:
        """Predict one request with every configuration, shape `(tiers, top_ks, num_blocks)`, milliseconds.

        Raises as `predict_many` does.
        """
        prediction_ms: Array = self.predict_many([sizes], np.array([num_output_tokens]), kind)[0]
        return prediction_ms

    def predict_many(
        self, sizes: Sequence[RequestSizes], num_output_tokens: ArrayLike, kind: BudgetKind = "e2e"
    ) -> Array:
        """Predict requests with every configuration, shape `(batch, tiers, top_ks, num_blocks)`, milliseconds.

        Args:
            sizes: one entry per request.
            num_output_tokens: shape `(batch,)`, each at least 1.

        Raises:
            ConfigError: `kind` is neither `e2e` nor `ttft`.
            ProfileError: sizes have another number of tiers, or a request has no output token.
        """
        _check_kind(kind)
        output_tokens = np.asarray(num_output_tokens)
        self._check_requests(sizes, output_tokens)
        if not sizes:
            return np.zeros((0, *self.knob_space.shape))
        vision = np.array(
            [[(tier.num_crops, tier.num_image_tokens) for tier in request.vision] for request in sizes], np.float64
        )
        request = np.array([(request.num_text_tokens, request.num_pixels) for request in sizes], np.float64)
        crops, tokens = vision[..., 0], vision[..., 1] + request[:, :1]

        # The sum of all stages, collected by how it depends on the two stage-2 knobs:
        # fixed + later_blocks * (per_block + per_expert * top_k), and the same again for whole_blocks. Only additions
        # and multiplications of non-negative numbers in a fixed order, so that rounding cannot break the monotony
        # either.
        prepare, vision_fit = self.stages["prepare_ms"].coefficients, self.stages["vision_ms"].coefficients
        first, prefill = self.stages["first_block_ms"].coefficients, self.stages["prefill_ms"].coefficients
        constant = prepare[0] + vision_fit[0] + first[0] + prefill[0]
        constant += self.stages["stage1_ms"].coefficients[0] + self.stages["overhead_ms"].coefficients[0]
        fixed = constant + (prepare[1] + vision_fit[1]) * crops + prepare[2] * request[:, 1:]
        fixed += tokens * (first[1] + first[2] * tokens)
        per_block, per_whole_block = prefill[1] + prefill[2] * tokens, prefill[3] * tokens**2
        per_expert, per_whole_expert = np.full_like(tokens, prefill[5]), prefill[4] * tokens
        if kind == "e2e":
            decode = self.stages["decode_ms_per_token"].coefficients
            steps = (output_tokens.astype(np.float64) - 1.0)[:, None]
            per_decode_block = steps * (decode[1] + decode[2] * (tokens + 0.5 * (steps + 1.0)))
            fixed += steps * (decode[0] + decode[3] * (self.stage2_after * self.trained_top_k))
            fixed += self.stage2_after * per_decode_block
            per_block += per_decode_block
            per_expert += decode[3] * steps
        later = self._later_blocks * _per_top_k(per_block, per_expert, self._top_ks)
        whole = self._whole_blocks * _per_top_k(per_whole_block, per_whole_expert, self._top_ks)
        return np.asarray(fixed[..., None, None] + (later + whole))

    def check_identity(
        self,
        *,
        model_identity: str | None = None,
        knob_space: KnobSpace | None = None,
        device: DeviceFacts | None = None,
    ) -> None:
        """Raise IdentityError if this was fitted for another model, knob space or device; None is not compared."""
        check_identity(self, model_identity=model_identity, knob_space=knob_space, device=device)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything the predictions depend on; what was calibrated for one estimator fits no other."""
        content = self._to_dict()
        content["stages"] = {stage: list(self.stages[stage].coefficients) for stage in STAGE_TERMS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the estimator as JSON; raises StorageError if that fails."""
        save_artefact(path, "latency estimator", ESTIMATOR_SCHEMA_VERSION, self._to_dict())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model_identity: str | None = None,
        knob_space: KnobSpace | None = None,
        device: DeviceFacts | None = None,
    ) -> LatencyEstimator:
        """Read an estimator and check what it was made for; None is not compared.

        Raises:
            ProfileError: the file is missing, corrupt or of another schema version.
            IdentityError: it was fitted for another model, knob space or device.
        """
        values = load_artefact(path, "latency estimator", ESTIMATOR_SCHEMA_VERSION)
        keys = {"model_identity", "knob_space", "device", "trained_top_k", "stage2_after", "stages"}
        try:
            check_keys("an estimator", values, keys)
            check_keys("the estimator's stages", values["stages"], set(STAGE_TERMS))
            typed(Text, values["model_identity"], "model_identity")
            stages = {stage: StageFit.from_dict(values["stages"][stage], terms) for stage, terms in STAGE_TERMS.items()}
            space, facts = load_knob_space(values["knob_space"]), DeviceFacts.from_dict(values["device"])
            estimator = cls(**{**values, "knob_space": space, "device": facts, "stages": stages})
        except (ProfileError, KnobError) as error:
            raise ProfileError(f"the latency estimator at {path} is corrupt: {error}; fit it anew") from error
        estimator.check_identity(model_identity=model_identity, knob_space=knob_space, device=device)
        return estimator

    def _to_dict(self) -> dict[str, Any]:
        return {
            "model_identity": self.model_identity,
            "knob_space": self.knob_space.to_dict(),
            "device": self.device.to_dict(),
            "trained_top_k": self.trained_top_k,
            "stage2_after": self.stage2_after,
            "stages": {stage: self.stages[stage].to_dict(terms) for stage, terms in STAGE_TERMS.items()},
        }

    def _coefficients(self, stage: str) -> Array:
        return np.array(self.stages[stage].coefficients)

    def _check_requests(self, sizes: Sequence[RequestSizes], num_output_tokens: NDArray[Any]) -> None:
        num_tiers = len(self.knob_space.tiers)
        for request in sizes:
            if len(request.vision) != num_tiers:
                raise ProfileError(f"sizes of {len(request.vision)} tiers given, but the knob space has {num_tiers}")
        if num_output_tokens.shape != (len(sizes),):
            raise ProfileError(
                f"{len(sizes)} requests need {len(sizes)} output lengths, not shape {num_output_tokens.shape}"
            )
        if sizes and not num_output_tokens.min() >= 1:
            raise ProfileError(f"num_output_tokens is {num_output_tokens.min()}; every request has at least 1")


def _check_decoded(samples: Sequence[Sample]) -> None:
    if all(sample.num_output_tokens == 1 for sample in samples):
        raise ProfileError("no sample of the profile has more than one output token; measure longer answers")


def _per_top_k(block: Array, expert: Array, top_ks: Array) -> Array:
    """Milliseconds of one block, `(batch, tiers)` each, for every top_k: `(batch, tiers, top_ks, 1)`."""
    return block[..., None, None] + expert[..., None, None] * top_ks


_PLURAL = {"top_k": "top_ks", "num_blocks": "num_blocks"}


def _check_kind(kind: str) -> None:
    if kind not in ("e2e", "ttft"):
        raise ConfigError(f"budget kind is {kind!r}; use 'e2e' (whole request) or 'ttft' (time to the first token)")


def _stage_terms(samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> dict[str, Array]:
    """Every stage's terms for measured requests, each of shape `(samples, terms)`."""
    columns = np.array(
        [
            (
                sample.num_crops,
                sample.num_prompt_tokens,
                sample.num_pixels,
                sample.knobs.top_k,
                sample.knobs.num_blocks,
                sample.num_output_tokens - 1,
            )
            for sample in samples
        ],
        dtype=np.float64,
    ).reshape(len(samples), 6)
    crops, tokens, pixels, top_k, num_blocks, steps = columns.T
    return _terms_of(
        crops=crops,
        tokens=tokens,
        pixels=pixels,
        top_k=top_k,
        num_blocks=num_blocks,
        steps=steps,
        trained_top_k=trained_top_k,
        stage2_after=stage2_after,
    )


def _terms_of(
    *,
    crops: Array,
    tokens: Array,
    pixels: Array,
    top_k: Array,
    num_blocks: Array,
    steps: Array,
    trained_top_k: int,
    stage2_after: int,
) -> dict[str, Array]:
    """Every stage's terms, each of shape `(n, terms)`, from columns of shape `(n,)`; the order is `STAGE_TERMS`'."""
    one = np.ones_like(tokens)
    later = num_blocks - stage2_after
    whole = np.maximum(later - 1.0, 0.0)
    # Decode step i attends to the prompt and i generated tokens, i = 1..steps: this is the mean over the steps.
    context = tokens + 0.5 * (steps + 1.0)
    columns: dict[str, list[Array]] = {
        "prepare_ms": [one, crops, pixels],
        "stage1_ms": [one],
        "vision_ms": [one, crops],
        "first_block_ms": [one, tokens, tokens**2],
        "prefill_ms": [one, later, later * tokens, whole * tokens**2, whole * tokens * top_k, later * top_k],
        "decode_ms_per_token": [
            one,
            num_blocks,
            num_blocks * context,
            stage2_after * trained_top_k + later * top_k,
        ],
        "overhead_ms": [one],
    }
    return {stage: np.stack(stage_columns, axis=1) for stage, stage_columns in columns.items()}


def _measured_stages(samples: Sequence[Sample]) -> dict[str, Array]:
    """Every stage's measured milliseconds, each of shape `(samples,)`; NaN where a request never decoded."""
    measured: dict[str, list[float]] = {stage: [] for stage in STAGE_TERMS}
    for sample in samples:
        times = sample.stages
        parts_ms = (times.prepare_ms, times.stage1_ms, times.vision_ms, times.first_block_ms, times.prefill_ms)
        for stage, part_ms in zip(STAGE_TERMS, parts_ms, strict=False):
            measured[stage].append(part_ms)
        decode_ms = sum(times.decode_ms)
        # The mean, not the median: it is the sum over the steps that a budget pays for.
        measured["decode_ms_per_token"].append(decode_ms / len(times.decode_ms) if times.decode_ms else np.nan)
        measured["overhead_ms"].append(max(times.e2e_ms - sum(parts_ms) - decode_ms, 0.0))
    return {stage: np.array(values) for stage, values in measured.items()}
