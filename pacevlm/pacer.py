"""The public face: a model, a controller and a guardrail that together answer within a budget."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from pacevlm.controller.policy import Controller, ControllerPolicy
from pacevlm.controller.policy_interface import Policy
from pacevlm.errors import BudgetError, CheckpointError, ConfigError, IdentityError, KnobError
from pacevlm.files import read_json, write_json_atomic
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs, KnobSpace, check_budget_ms
from pacevlm.latency.drift import DriftCorrection, DriftSettings
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import DEFAULT_MAX_CROPS, ElasticModel, read_elastic_settings
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.rollout.request import Pacing, run_with_policy
from pacevlm.types import StageTimes

BUNDLE_NAME = "bundle.json"
BUNDLE_FOLDER = "bundle"
FORMAT = "pacevlm-bundle"
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Answer:
    """An answer, and how it kept its budget.

    Attributes:
        answer: the text.
        knobs: the configuration that ran.
        budget_ms: what was asked for.
        budget_met: whether some configuration was expected to fit and the measured time did.
        feasible: whether any configuration's upper bound fitted what was left of the budget when the request began;
            where none did, the cheapest ran.
        predicted_ms: the estimator's latency of these knobs at this answer's length, on the machine as profiled.
        upper_bound_ms: the bound on the latency that was known beforehand, corrected for drift; infinite where nothing
            is promised. Waiting comes on top.
        measured_ms: wall-clock time of what the budget covers, from the call on, waiting included.
        times: measured stages; the guardrail and the controller are inside.
        num_output_tokens: tokens generated, end-of-text included.
        drift_factor: how many times the profiled bounds this request's were; 1 where drift is not tracked.
        waited_ms: how long the request waited for those of other threads.
        why_infeasible: why nothing was feasible, in a sentence; None where something was.
    """

    answer: str
    knobs: Knobs
    budget_ms: float
    budget_met: bool
    feasible: bool
    predicted_ms: float
    upper_bound_ms: float
    measured_ms: float
    times: StageTimes
    num_output_tokens: int
    drift_factor: float = 1.0
    waited_ms: float = 0.0
    why_infeasible: str | None = None


@dataclass(frozen=True)
class Estimate:
    """Latency of one request under one configuration, before anything runs.

    Attributes:
        predicted_ms: the estimator's latency for an answer as long as its bound.
        upper_bound_ms: the guardrail's bound, corrected for drift; budgets from here on admit these knobs. Infinite for
            a request beyond what was profiled.
    """

    knobs: Knobs
    predicted_ms: float
    upper_bound_ms: float


class Pacer:
    """Answers questions about images, each within its own latency budget.

    All methods may be called from any thread. Requests run one at a time, in no promised order, because that is how
    they were profiled: `answer` waits for its turn, and what it waited is gone from its budget. Drift is learned from
    what requests take once they run. `track_drift` and `save_drift` wait for a running request too. `estimate` does
    not wait; what it computes slows a running request on the same processor down. Several pacers, and other work in
    the process, do not know of each other; the number of threads that torch uses, which `answer` sets for as long as
    it runs, is the process's.

    Args:
        model: the frozen model.
        controller: chooses the knobs.
        pacing: guardrail, output lengths and what budgets cover.
        full_p50_ms: median milliseconds of the full configuration on the profiled device.
        model_path: where the model came from, `embedded` or a directory; stored in bundles.
        num_threads: CPU threads of a request, as profiled; None leaves them as they are.
        drift: correction of the guardrail's bounds that follows the machine; None holds on to the profile.

    Raises:
        IdentityError: the parts were made for different models, knob spaces or estimators.
        BudgetError: `full_p50_ms` is not a positive, finite number.
    """

    def __init__(
        self,
        model: ElasticModel,
        controller: Controller,
        pacing: Pacing,
        *,
        full_p50_ms: float,
        model_path: str | os.PathLike[str] = "embedded",
        num_threads: int | None = None,
        drift: DriftCorrection | None = None,
    ) -> None:
        pacing.check_model(model)
        fingerprint = pacing.guardrail.estimator.fingerprint
        for what, made_for, found in (
            ("model", controller.model_identity, model.identity),
            ("knob space", controller.knob_space, model.knob_space),
            ("latency estimator", controller.estimator_fingerprint, fingerprint),
        ):
            if made_for != found:
                raise IdentityError(f"the controller was trained for another {what}: {made_for!r}, not {found!r}")
        self.model, self.controller, self.pacing = model, controller, pacing
        self.full_p50_ms = check_budget_ms(full_p50_ms)
        self.model_path, self.num_threads = os.fspath(model_path), num_threads
        self.policy: Policy = ControllerPolicy(controller.eval())
        if drift is not None:
            drift.check_guardrail(pacing.guardrail, pacing.kind)
        self.drift = drift
        self._drift_path: Path | None = None
        # Re-entrant, so that a policy that asks its own pacer does not wait for itself.
        self._running = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        model_path: str | os.PathLike[str] | None = None,
        any_device: bool = False,
    ) -> Self:
        """Load a bundle with everything in it, checking that its parts belong together.

        Args:
            path: a directory that `save_pretrained` wrote, or a run directory with a `bundle` folder in it.
            device: where the model runs.
            model_path: where the model is, if no longer where the bundle says.
            any_device: accept latencies that were profiled on another device; budgets then mean little.

        Raises:
            CheckpointError: a file is missing, malformed or of another version.
            IdentityError: the parts were made for different models, knob spaces or devices.
            ProfileError: a latency file is missing or malformed.
            KnobError: the model cannot run the knob space.
        """
        folder = _bundle_folder(path)
        values = _read_bundle(folder / BUNDLE_NAME)
        settings = values["model"]
        source = _model_folder(os.fspath(model_path or settings["path"]), folder)
        model = ElasticModel.from_pretrained(
            source,
            knob_space=values["knob_space"],
            device=device,
            dtype=DTYPES[settings["dtype"]],
            stage2_after=settings["stage2_after"],
            policy=settings["block_policy"],
            # Limits of tiers outside the knob space count in the model's identity too.
            max_crops=_stored_max_crops(source) | settings["max_crops"],
            max_new_tokens=settings["max_new_tokens"],
        )
        if model.identity != settings["identity"]:
            raise IdentityError(
                f"the bundle {folder} was made for model {settings['identity']}, but {source} is {model.identity}: its "
                "weights or its elastic.json changed; give the right one as model_path, or train for this one"
            )
        model.capture_decode()
        with use_num_threads(values["num_threads"]):
            facts = None if any_device else collect_device_facts(device, model.dtype)
        estimator = LatencyEstimator.load(
            folder / "estimator.json", model_identity=model.identity, knob_space=model.knob_space, device=facts
        )
        lengths_file = folder / "output_length.json"
        pacing = Pacing(
            guardrail=Guardrail.load(folder / "guardrail.json", estimator),
            output_length=OutputLengthModel.load(lengths_file, model_identity=model.identity)
            if values["output_length"]
            else None,
            max_new_tokens=model.max_new_tokens,
            kind=values["budget_kind"],
        )
        controller = Controller.from_pretrained(
            folder / "controller",
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=estimator.fingerprint,
            d_model=model.d_model,
        )
        return cls(
            model,
            controller,
            pacing,
            full_p50_ms=values["full_p50_ms"],
            model_path=model_path or settings["path"],
            num_threads=values["num_threads"],
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model's weights into a directory.

        Raises:
            StorageError: a file could not be written.
        """
        folder, model = Path(path), self.model
        self.controller.save_pretrained(folder / "controller")
        self.pacing.guardrail.estimator.save(folder / "estimator.json")
        self.pacing.guardrail.save(folder / "guardrail.json")
        if self.pacing.output_length is not None:
            self.pacing.output_length.save(folder / "output_length.json")
        source = self.model_path
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "path": source if source == "embedded" else os.path.abspath(source),
                "identity": model.identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "stage2_after": model.stage2_after,
                "block_policy": model.order.source,
                "max_crops": model.max_crops,
                "max_new_tokens": model.max_new_tokens,
            },
            "knob_space": model.knob_space.to_dict(),
            "full_p50_ms": self.full_p50_ms,
            "budget_kind": self.pacing.kind,
            "num_threads": self.num_threads,
            "output_length": self.pacing.output_length is not None,
        }
        # Last, so that a bundle that can be opened is whole.
        write_json_atomic(folder / BUNDLE_NAME, content)

    def answer(
        self, image: ImageSource, question: str, budget_ms: float = 80.0, policy: Policy | None = None
    ) -> Answer:
        """Answer a question about an image within a latency budget, which counts from this call.

        Args:
            image: path, bytes, PIL image or uint8 array.
            question: the user's text.
            budget_ms: milliseconds for what the bundle's budgets cover, by default the whole request.
            policy: chooses the knobs in place of the controller.

        Raises:
            BudgetError: the budget is not a positive, finite number.
            ImageError: the image cannot be read or used.
            QuestionError: the question is empty, too long or not text.
            ConfigError: `policy` is no policy.
        """
        chosen = self.policy if policy is None else policy
        if not isinstance(chosen, Policy):
            raise ConfigError(
                f"policy is {policy!r}; give an object with name, choose_tier, latency_token, choose_compute"
            )
        called = time.perf_counter()
        budget_ms = check_budget_ms(budget_ms)
        with self._running, use_num_threads(self.num_threads):
            waited_ms = (time.perf_counter() - called) * 1e3
            paced = run_with_policy(
                self.model, chosen, image, question, budget_ms, self.pacing, drift=self.drift, waited_ms=waited_ms
            )
        return Answer(
            answer=paced.result.answer,
            knobs=paced.result.knobs,
            budget_ms=paced.budget_ms,
            budget_met=paced.budget_met,
            feasible=paced.feasible,
            predicted_ms=paced.predicted_ms,
            upper_bound_ms=paced.upper_bound_ms,
            measured_ms=paced.measured_ms,
            times=paced.result.times,
            num_output_tokens=paced.result.num_output_tokens,
            drift_factor=paced.drift_factor,
            waited_ms=paced.waited_ms,
            why_infeasible=paced.why_infeasible,
        )

    def track_drift(
        self, path: str | os.PathLike[str] | None = None, settings: DriftSettings | None = None
    ) -> DriftCorrection:
        """From now on correct the guardrail's bounds by how slow the machine turns out to be, answer by answer.

        Warm the model up first: what the first answer of a process takes longer counts as a slower machine.

        Args:
            path: file that an earlier `save_drift` wrote, to go on from with its settings; there need be none yet.
            settings: how to follow the machine where there is no such file.

        Raises:
            ProfileError: the file is corrupt or of another schema version.
            IdentityError: it was learned with another estimator or kind of budget.
        """
        guardrail, kind = self.pacing.guardrail, self.pacing.kind
        with self._running:
            self._drift_path = None if path is None else Path(path)
            if self._drift_path is not None and self._drift_path.exists():
                self.drift = DriftCorrection.load(self._drift_path, guardrail, kind)
            else:
                self.drift = DriftCorrection.for_guardrail(guardrail, kind, settings)
            return self.drift

    def save_drift(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write what was learned of the machine's drift, whole or not at all.

        Answers do not do it on their own, because waiting for the disk would delay them.

        Args:
            path: the file; the one that `track_drift` was given if None.

        Raises:
            ConfigError: drift is not tracked, or there is no path.
            StorageError: the file could not be written.
        """
        with self._running:
            target = self._drift_path if path is None else Path(path)
            if self.drift is None or target is None:
                missing = (
                    "drift is not tracked; call track_drift" if self.drift is None else "there is no path; give one"
                )
                raise ConfigError(f"the drift correction cannot be saved: {missing} first")
            self.drift.save(target)

    def estimate(self, image: ImageSource, question: str) -> tuple[Estimate, ...]:
        """Latency of a request under every configuration, in the order of the knob space; runs nothing.

        Raises:
            ImageError, QuestionError: the input cannot be used.
        """
        with torch.inference_mode():
            view = self.model.view(image, question)
        estimator = self.pacing.guardrail.estimator
        predicted_ms = estimator.predict_all(view.sizes, self.pacing.output_tokens_upper(view), self.pacing.kind)
        bounds_ms = self.pacing.upper_bounds_ms(view) * (1.0 if self.drift is None else self.drift.factor)
        return tuple(
            Estimate(knobs, float(predicted), float(bound))
            for knobs, predicted, bound in zip(
                self.model.knob_space, np.ravel(predicted_ms), np.ravel(bounds_ms), strict=True
            )
        )


def _bundle_folder(path: str | os.PathLike[str]) -> Path:
    for folder in (Path(path), Path(path) / BUNDLE_FOLDER):
        if (folder / BUNDLE_NAME).is_file():
            return folder
    raise CheckpointError(
        f"there is no {BUNDLE_NAME} in {os.fspath(path)} or its folder {BUNDLE_FOLDER!r}; give a directory that "
        "save_pretrained wrote, or that of a finished run"
    )


def _read_bundle(path: Path) -> dict[str, Any]:
    """The values of a bundle file, `knob_space` as a KnobSpace; raises CheckpointError if it is malformed."""
    values = read_json(path, "bundle", CheckpointError)
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{path} holds {found}, not {(FORMAT, VERSION)}; save the bundle again")
    kinds: dict[str, Any] = {
        "model": dict,
        "knob_space": dict,
        "full_p50_ms": (int, float),
        "budget_kind": str,
        "num_threads": (int, type(None)),
        "output_length": bool,
    }
    model_kinds: dict[str, Any] = {
        "path": str,
        "identity": str,
        "dtype": str,
        "stage2_after": int,
        "block_policy": str,
        "max_crops": dict,
        "max_new_tokens": int,
    }
    for what, entries, expected in (
        (str(path), values, kinds),
        (f"'model' in {path}", values.get("model"), model_kinds),
    ):
        wrong = [
            key
            for key, kind in expected.items()
            if not isinstance(entries, dict) or key not in entries or not isinstance(entries[key], kind)
        ]
        if wrong:
            raise CheckpointError(f"{what} lacks or garbles the entries {wrong}; save the bundle again")
    if values["model"]["dtype"] not in DTYPES or values["budget_kind"] not in ("e2e", "ttft"):
        raise CheckpointError(
            f"{path} asks for dtype {values['model']['dtype']!r} and budget kind {values['budget_kind']!r}; known are "
            f"{sorted(DTYPES)} and ['e2e', 'ttft']"
        )
    try:
        check_budget_ms(values["full_p50_ms"])
        return {**values, "knob_space": KnobSpace.from_dict(values["knob_space"])}
    except (BudgetError, KnobError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is malformed: {error}; save the bundle again") from error


def _model_folder(path: str, bundle: Path) -> Path:
    """Where a model directory is; a relative one may lie beside the bundle's files, so that both can move together."""
    if path == "embedded":
        return EMBEDDED_DIR
    beside = bundle / path
    return beside if beside.is_dir() else Path(path)


def _stored_max_crops(folder: Path) -> dict[str, int]:
    stored: dict[str, int] = read_elastic_settings(folder).get("max_crops", DEFAULT_MAX_CROPS)
    return dict(stored)
