"""The latency estimator: a physical model of each stage of a request, fitted to a profile."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.artefact import MAX_COUNT, Text, check_keys, load_artefact, save_artefact, typed
from pacevlm.errors import KnobError, ProfileError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.images import TURNED
from pacevlm.knobs import MAX_VALUE, Knobs, KnobSpace
from pacevlm.latency.picture_fit import RANGE_TOLERANCE, PictureFit, fit_pictures, upright_kind
from pacevlm.latency.profile import DeviceFacts, Profile, Sample, load_knob_space
from pacevlm.latency.stage_fit import StageFit, check_coefficients, fit_stage
from pacevlm.latency.stage_terms import STAGE_TERMS, WORK_UNITS, measured_stages, stage_terms, term_columns
from pacevlm.types import BudgetKind, RequestSizes, VisionSizes, check_budget_kind

ESTIMATOR_SCHEMA_VERSION = 7

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """Predicted milliseconds of one request's stages; `decode_ms` is the sum over all tokens after the first."""

    read_ms: float
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
        picture_ms = self.read_ms + self.prepare_ms
        return picture_ms + self.stage1_ms + self.vision_ms + self.first_block_ms + self.prefill_ms + self.overhead_ms

    @property
    def e2e_ms(self) -> float:
        """Time to the last token, in milliseconds."""
        return self.ttft_ms + self.decode_ms

    def covered_ms(self, kind: BudgetKind) -> float:
        """The time that a budget of this kind covers, in milliseconds."""
        return self.e2e_ms if kind == "e2e" else self.ttft_ms


class SplitMs(NamedTuple):
    """Predictions in two parts, because what reading a picture takes scatters otherwise than what the model takes.

    Attributes:
        picture: reading and preparing, milliseconds.
        rest: everything else, milliseconds.
    """

    picture: Array
    rest: Array


@dataclass(frozen=True)
class LatencyEstimator:
    """Predicts a request's latency from its sizes, knobs and output length.

    Every coefficient is non-negative, so a prediction never falls when a knob, a size or the output length grows.
    Beyond what was profiled (`beyond`) a prediction is a guess on which no bound may rest.

    Attributes:
        trained_top_k: experts per token that the model was trained with; blocks before
            stage 2 use it always.
        stage2_after: number of leading blocks that always run, at `trained_top_k`.
        stages: for every stage of `STAGE_TERMS` its coefficients in milliseconds per unit of each term, and its
            fit quality.
        pictures: what reading takes, for every kind of picture that was profiled.
        max_text_tokens: of the longest prompt that was profiled.

    Raises:
        ProfileError: a stage is missing, there is no kind of picture, or a coefficient is negative, not finite or one
            too many.
        KnobError: the knob space runs fewer blocks than `stage2_after`.
    """

    model_identity: str
    knob_space: KnobSpace
    device: DeviceFacts
    trained_top_k: int
    stage2_after: int
    stages: Mapping[str, StageFit]
    pictures: Mapping[str, PictureFit]
    max_text_tokens: int
    _later_blocks: Array = field(init=False, repr=False, compare=False)
    _whole_blocks: Array = field(init=False, repr=False, compare=False)
    _top_ks: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        limits = {"trained_top_k": MAX_VALUE, "stage2_after": MAX_VALUE, "max_text_tokens": MAX_COUNT}
        for name, most in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ProfileError(f"{name} is {value!r}; it must be a whole number in 1..{most}")
        if self.knob_space.num_blocks[0] < self.stage2_after:
            raise KnobError(
                f"num_blocks {self.knob_space.num_blocks[0]} is below stage2_after {self.stage2_after}, "
                "the number of blocks that always run"
            )
        check_keys("the estimator's stages", self.stages, set(STAGE_TERMS))
        for stage, terms in STAGE_TERMS.items():
            check_coefficients(stage, self.stages[stage], terms)
        if not self.pictures:
            raise ProfileError("the estimator knows no kind of picture; profile some")
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
        samples = profile.all_samples
        for name in ("tier", "top_k", "num_blocks"):
            values = profile.knob_space.tiers if name == "tier" else getattr(profile.knob_space, _PLURAL[name])
            measured = {getattr(sample.knobs, name) for sample in samples}
            missing = [value for value in dict.fromkeys((values[0], values[-1])) if value not in measured]
            if missing:
                raise ProfileError(f"the profile has no sample with {name} {missing}; measure them and fit again")
        _check_decoded(samples)
        terms = stage_terms(samples, trained_top_k, stage2_after)
        measured_ms = measured_stages(samples)
        stages = {}
        for stage in STAGE_TERMS:
            # A request with a single output token says nothing about decoding.
            rows = np.isfinite(measured_ms[stage])
            stages[stage] = fit_stage(terms[stage][rows], measured_ms[stage][rows])
        return cls(
            profile.model_identity,
            profile.knob_space,
            profile.device,
            trained_top_k,
            stage2_after,
            stages,
            fit_pictures(samples),
            max(sample.num_text_tokens for sample in samples),
        )

    def reaching(self, samples: Sequence[Sample]) -> LatencyEstimator:
        """The same, good for requests as large as these too, of the kinds of pictures that it knows."""
        pictures = {
            kind: fit.reaching([sample for sample in samples if upright_kind(sample.picture_kind) == kind])
            for kind, fit in self.pictures.items()
        }
        longest = max([self.max_text_tokens, *(sample.num_text_tokens for sample in samples)])
        return replace(self, pictures=pictures, max_text_tokens=longest)

    def beyond(self, sizes: RequestSizes) -> str | None:
        """Why nothing is promised of such a request: a sentence that names what was not profiled; None if all was."""
        fit = self.pictures.get(upright_kind(sizes.picture_kind))
        if fit is None:
            return f"no {sizes.picture_kind} picture was profiled, only {', '.join(sorted(self.pictures))}"
        max_pixels = fit.max_turned_pixels if sizes.picture_kind.startswith(TURNED) else fit.max_pixels
        for value, most, what in (
            (sizes.num_pixels, max_pixels, f"the {sizes.picture_kind} picture has {{:,}} pixels"),
            (sizes.num_bytes, fit.max_bytes, f"the {sizes.picture_kind} file has {{:,}} bytes"),
            (sizes.num_text_tokens, self.max_text_tokens, "the prompt has {:,} text tokens"),
        ):
            if value > most * (1.0 + RANGE_TOLERANCE):
                return f"{what.format(value)}, but only up to {most:,} were profiled"
        return None

    def transfer(self, profile: Profile) -> LatencyEstimator:
        """This estimator carried over to the device of another profile of the same model, from as few as 25 samples.

        Of every stage two factors are fitted, one for the terms that grow with the work (`WORK_UNITS`) and one for the
        others, by the same robust non-negative least squares that fits all coefficients otherwise. What reading a
        picture takes is fitted anew, from the profile's pictures.

        Raises:
            IdentityError: the profile is of another model or knob space.
            ProfileError: no sample has more than one output token.
        """
        profile.made_for.check("the profile", Identity(self.model_identity, self.knob_space))
        _check_decoded(profile.all_samples)
        samples = profile.all_samples
        terms = stage_terms(samples, self.trained_top_k, self.stage2_after)
        measured_ms = measured_stages(samples)
        stages = {}
        for stage, names in STAGE_TERMS.items():
            rows = np.isfinite(measured_ms[stage])
            is_work = np.array([any(unit in name for unit in WORK_UNITS) for name in names])
            old = self._coefficients(stage)
            parts = np.stack([terms[stage][rows] @ (old * is_work), terms[stage][rows] @ (old * ~is_work)], axis=1)
            fit = fit_stage(parts, measured_ms[stage][rows])
            new = old * np.where(is_work, *fit.coefficients)
            stages[stage] = replace(fit, coefficients=tuple(new.tolist()))
        return replace(
            self,
            device=profile.device,
            stages=stages,
            pictures=fit_pictures(samples),
            max_text_tokens=max(sample.num_text_tokens for sample in samples),
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
        num_tokens = vision.num_image_tokens + sizes.num_text_tokens
        work = (vision.num_units, vision.num_unit_pairs, num_tokens, sizes.num_pixels, *knobs.compute)
        terms = term_columns(
            *map(float, (*work, num_output_tokens - 1)),
            trained_top_k=self.trained_top_k,
            stage2_after=self.stage2_after,
        )
        stage_ms = {stage: sum(map(mul, self.stages[stage].coefficients, terms[stage])) for stage in STAGE_TERMS}
        decode_ms = stage_ms.pop("decode_ms_per_token") * (num_output_tokens - 1)
        return StagePrediction(read_ms=self._read_ms(sizes), **stage_ms, decode_ms=decode_ms)

    def predict_samples(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """Predict measured requests with the knobs and output lengths they had, shape `(samples,)`, milliseconds."""
        return np.asarray(sum(self.split_samples_ms(samples, kind)))

    def split_samples_ms(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> SplitMs:
        """`predict_samples` in two parts, each of shape `(samples,)`."""
        check_budget_kind(kind)
        terms = stage_terms(samples, self.trained_top_k, self.stage2_after)
        picture_ms, rest_ms = (
            np.array([self._read_ms(sample) for sample in samples], np.float64),
            np.zeros(len(samples)),
        )
        for stage in STAGE_TERMS:
            stage_ms: Array = terms[stage] @ self._coefficients(stage)
            if stage == "decode_ms_per_token":
                steps = np.array([sample.num_output_tokens - 1 for sample in samples], dtype=np.float64)
                stage_ms = stage_ms * steps if kind == "e2e" else np.zeros(len(samples))
            if stage == "prepare_ms":
                picture_ms += stage_ms
            else:
                rest_ms += stage_ms
        return SplitMs(picture_ms, rest_ms)

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
        picture_ms, rest_ms = self.split_many_ms(sizes, num_output_tokens, kind)
        return np.asarray(picture_ms[..., None, None] + rest_ms)

    def split_many_ms(
        self, sizes: Sequence[RequestSizes], num_output_tokens: ArrayLike, kind: BudgetKind = "e2e"
    ) -> SplitMs:
        """`predict_many` in two parts: the picture's `(batch, tiers)`, the rest's `(batch, tiers, top_ks, num_blocks)`.

        Raises as `predict_many` does.
        """
        check_budget_kind(kind)
        output_tokens = np.asarray(num_output_tokens)
        self._check_requests(sizes, output_tokens)
        if not sizes:
            return SplitMs(np.zeros((0, len(self.knob_space.tiers))), np.zeros((0, *self.knob_space.shape)))
        vision = np.array(
            [[(v.num_units, v.num_unit_pairs, v.num_image_tokens) for v in request.vision] for request in sizes],
            np.float64,
        )
        request = np.array(
            [(request.num_text_tokens, request.num_pixels, self._read_ms(request)) for request in sizes], np.float64
        )
        units, unit_pairs, tokens = vision[..., 0], vision[..., 1], vision[..., 2] + request[:, :1]
        prepare, vision_fit = self.stages["prepare_ms"].coefficients, self.stages["vision_ms"].coefficients
        picture_ms = prepare[0] + prepare[1] * units + prepare[2] * request[:, 1:2] + request[:, 2:]

        # The sum of all other stages, collected by how it depends on the two stage-2 knobs:
        # fixed + later_blocks * (per_block + per_expert * top_k), and the same again for whole_blocks. Only additions
        # and multiplications of non-negative numbers in a fixed order, so that rounding cannot break the monotony
        # either.
        first, prefill = self.stages["first_block_ms"].coefficients, self.stages["prefill_ms"].coefficients
        constant = vision_fit[0] + first[0] + prefill[0]
        constant += self.stages["stage1_ms"].coefficients[0] + self.stages["overhead_ms"].coefficients[0]
        fixed = constant + vision_fit[1] * units + vision_fit[2] * unit_pairs
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
        return SplitMs(picture_ms, np.asarray(fixed[..., None, None] + (later + whole)))

    @property
    def made_for(self) -> Identity:
        """The model, knob space and device whose latencies it predicts, and itself."""
        return Identity(self.model_identity, self.knob_space, self.fingerprint, self.device.identity)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything the predictions depend on; what was calibrated for one estimator fits no other."""
        content = self._to_dict()
        content["stages"] = {stage: list(self.stages[stage].coefficients) for stage in STAGE_TERMS}
        content["pictures"] = {
            kind: [*fit.read.coefficients, fit.max_pixels, fit.max_turned_pixels, fit.max_bytes]
            for kind, fit in self.pictures.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the estimator as JSON; raises StorageError if that fails."""
        save_artefact(path, "latency estimator", ESTIMATOR_SCHEMA_VERSION, self._to_dict())

    @classmethod
    def load(cls, path: str | Path, wanted: Identity = ANYTHING) -> LatencyEstimator:
        """Read an estimator and check what it was made for.

        Raises:
            ProfileError: the file is missing, corrupt or of another schema version.
            IdentityError: it was fitted for another model, knob space or device.
        """
        values = load_artefact(path, "latency estimator", ESTIMATOR_SCHEMA_VERSION)
        keys = {"model_identity", "knob_space", "device", "trained_top_k", "stage2_after", "stages"}
        keys |= {"pictures", "max_text_tokens"}
        try:
            check_keys("an estimator", values, keys)
            check_keys("the estimator's stages", values["stages"], set(STAGE_TERMS))
            typed(Text, values["model_identity"], "model_identity")
            stages = {stage: StageFit.from_dict(values["stages"][stage], terms) for stage, terms in STAGE_TERMS.items()}
            pictures = {kind: PictureFit.from_dict(fit) for kind, fit in values["pictures"].items()}
            space, facts = load_knob_space(values["knob_space"]), DeviceFacts.from_dict(values["device"])
            estimator = cls(**{**values, "knob_space": space, "device": facts, "stages": stages, "pictures": pictures})
        except (AttributeError, ProfileError, KnobError) as error:
            raise ProfileError(f"the latency estimator at {path} is corrupt: {error}; fit it anew") from error
        estimator.made_for.check(f"the latency estimator at {path}", wanted)
        return estimator

    def _to_dict(self) -> dict[str, Any]:
        return {
            "model_identity": self.model_identity,
            "knob_space": self.knob_space.to_dict(),
            "device": self.device.to_dict(),
            "trained_top_k": self.trained_top_k,
            "stage2_after": self.stage2_after,
            "stages": {stage: self.stages[stage].to_dict(terms) for stage, terms in STAGE_TERMS.items()},
            "pictures": {kind: fit.to_dict() for kind, fit in self.pictures.items()},
            "max_text_tokens": self.max_text_tokens,
        }

    def _read_ms(self, request: RequestSizes | Sample) -> float:
        """Reading a request's picture; of a kind that was not profiled, as long as the dearest one would take."""
        fit = self.pictures.get(upright_kind(request.picture_kind))
        fits = self.pictures.values() if fit is None else (fit,)
        return max(one.read_ms(request.picture_kind, request.num_pixels, request.num_bytes) for one in fits)

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
