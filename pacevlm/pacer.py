"""The public face: a model, a controller and a guardrail that together answer within a budget."""

from __future__ import annotations

import functools
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

import numpy as np
import torch

from pacevlm.artefact import Ms, Range, Sha256, Text, load_artefact, save_artefact, typed
from pacevlm.baselines.most import MostPolicy
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.config import PictureConfig, config_to_dict
from pacevlm.controller.checkpoint import JSON_NAME as CONTROLLER_JSON
from pacevlm.controller.checkpoint import WEIGHTS_NAME as CONTROLLER_WEIGHTS
from pacevlm.controller.policy import Controller, ControllerPolicy
from pacevlm.controller.policy_interface import Policy
from pacevlm.devices import resolve_device
from pacevlm.errors import CheckpointError, ConfigError, IdentityError
from pacevlm.evaluation.prices import PricePoint, PriceTable
from pacevlm.files import find_portable, portable_path, sha256_file
from pacevlm.identity import Identity
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs, KnobSpace, check_budget_ms
from pacevlm.latency.drift import DriftCorrection, DriftSettings
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.measuring import available_threads, use_num_threads
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import MAX_NUM_THREADS, collect_device_facts
from pacevlm.models.elastic import ElasticModel, NewTokens, VisionBudgets
from pacevlm.models.folder import find_model_folder
from pacevlm.request.pacing import Pacing
from pacevlm.request.run import run_request
from pacevlm.types import Answer, BudgetKind, Objective, RequestSizes, check_budget_kind

BUNDLE_FILE = "bundle.json"
BUNDLE_FOLDER = "bundle"
KIND = "bundle"
SCHEMA_VERSION = 5
ESTIMATOR_NAME, GUARDRAIL_NAME, OUTPUT_LENGTH_NAME = "estimator.json", "guardrail.json", "output_length.json"
PRICES_NAME, PREDICTOR_NAME = "prices.json", "predictor.json"
CONTROLLER_FOLDER = "controller"
# Files that every bundle lists. A model without bounds on its answers has no OUTPUT_LENGTH_NAME, one whose prices were
# not calibrated no PRICES_NAME, and one that answers with its controller no PREDICTOR_NAME.
_LISTED = (
    ESTIMATOR_NAME,
    GUARDRAIL_NAME,
    f"{CONTROLLER_FOLDER}/{CONTROLLER_JSON}",
    f"{CONTROLLER_FOLDER}/{CONTROLLER_WEIGHTS}",
)
# How many times the full configuration's bound may be the measured median, or the median the bound: a bound is at most
# ten times the median on a busy machine, and pictures and answers differ as much.
MAX_BOUND_RATIO = 100.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        controller: chooses the knobs, where there is no predictor.
        pacing: guardrail and output lengths.
        kind: what budgets cover.
        full_p50_ms: median milliseconds of the full configuration on the profiled device.
        model_path: where the model came from, `embedded` or a directory; stored in bundles.
        num_threads: CPU threads of a request, as profiled; None leaves them as they are.
        prices: what prices of time cost and save with what chooses; None where that was not measured.
        predictor: chooses the knobs; None leaves it to the controller.
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
        kind: BudgetKind = "e2e",
        model_path: str | os.PathLike[str] = "embedded",
        num_threads: int | None = None,
        prices: PriceTable | None = None,
        drift: DriftCorrection | None = None,
        predictor: PredictorPolicy | None = None,
    ) -> None:
        pacing.made_for.check("the pacing", model.made_for)
        controller.made_for.check("the controller", pacing.made_for)
        check_budget_kind(kind)
        self.model, self.controller, self.pacing, self.kind = model, controller, pacing, kind
        self.full_p50_ms = check_budget_ms(full_p50_ms)
        self.model_path, self.num_threads = os.fspath(model_path), num_threads
        if predictor is not None:
            Identity(knob_space=predictor.space).check("the predictor", Identity(knob_space=model.knob_space))
        self.predictor = predictor
        self.policy: Policy = ControllerPolicy(controller.eval()) if predictor is None else predictor
        self.prices = prices
        if drift is not None:
            drift.check_guardrail(pacing.guardrail, kind)
        self.drift = drift
        self._drift_path: Path | None = None
        self._loaded_with: dict[str, Any] | None = None  # what from_pretrained was given
        # Re-entrant, so that a policy that asks its own pacer does not wait for itself.
        self._running = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and other processes, load the bundle anew; drift tracking and a changed policy are not carried over.

        Raises:
            ConfigError: this one was made in memory, from no bundle.
        """
        if self._loaded_with is None:
            raise ConfigError(
                "a Pacer that was made in memory cannot be copied or sent to another process; write it with "
                "save_pretrained and load it there with Pacer.from_pretrained"
            )
        return functools.partial(type(self).from_pretrained, **self._loaded_with), ()

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
            device: where the model runs; see `resolve_device`.
            model_path: where the model is, if no longer where the bundle says; as `find_model_folder` takes it.
            any_device: accept latencies that were profiled on another device, or with more threads than there are CPUs
                here; budgets then mean little.

        Raises:
            CheckpointError: a file is missing, was changed since the bundle was written, is malformed or of another
                version, or bounds and measured latency of the full configuration have nothing to do with each other.
            IdentityError: the parts were made for different models, knob spaces or devices.
            ProfileError: a latency file is malformed.
            KnobError: the model cannot run the knob space.
            ConfigError: there is no such device, or there are fewer CPUs than threads were profiled with.
        """
        device = resolve_device(device)
        folder = bundle_folder(path)
        values = read_bundle(folder)
        settings = values["model"]
        place = os.fspath(model_path or find_bundle_model(settings, folder))
        source = find_model_folder(place)
        place = place if place == "embedded" else os.fspath(source)
        model = ElasticModel.from_pretrained(
            source,
            knob_space=values["knob_space"],
            device=device,
            dtype=DTYPES[settings["dtype"]],
            stage2_after=settings["stage2_after"],
            block_order=settings["block_order"],
            vision_budgets=settings["vision_budgets"],
            max_new_tokens=settings["max_new_tokens"],
            picture_config=values["picture"],
        )
        if model.identity != settings["identity"]:
            raise IdentityError(
                f"the bundle {folder} was made for model {settings['identity']}, but {source} is {model.identity}: its "
                "weights or its elastic.json changed; give the right one as model_path, or train for this one"
            )
        model.capture_graphs()
        num_threads = values["num_threads"]
        if any_device and num_threads is not None:
            num_threads = min(num_threads, available_threads())
        with use_num_threads(num_threads):
            facts = collect_device_facts(device, model.dtype, compiler=model.adapter.compiler)
        wanted = model.made_for if any_device else replace(model.made_for, device=facts.identity)
        estimator = LatencyEstimator.load(folder / ESTIMATOR_NAME, wanted)
        pacing = Pacing(
            guardrail=Guardrail.load(folder / GUARDRAIL_NAME, estimator),
            output_length=OutputLengthModel.load(folder / OUTPUT_LENGTH_NAME, wanted)
            if OUTPUT_LENGTH_NAME in values["files"]
            else None,
            max_new_tokens=model.max_new_tokens,
        )
        kind: BudgetKind = values["budget_kind"]
        _check_scale(folder, model, pacing, kind, values["full_p50_ms"])
        controller = Controller.from_pretrained(
            folder / CONTROLLER_FOLDER, replace(pacing.made_for, d_model=model.d_model), device=model.device
        )
        pacer = cls(
            model,
            controller,
            pacing,
            full_p50_ms=values["full_p50_ms"],
            kind=kind,
            model_path=place,
            num_threads=num_threads,
            prices=PriceTable.load(folder / PRICES_NAME) if PRICES_NAME in values["files"] else None,
            predictor=PredictorPolicy.load(folder / PREDICTOR_NAME, model.knob_space)
            if PREDICTOR_NAME in values["files"]
            else None,
        )
        pacer._loaded_with = {
            "path": os.path.abspath(path),
            "device": str(device),
            "model_path": os.path.abspath(place) if model_path and place != "embedded" else model_path,
            "any_device": any_device,
        }
        return pacer

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model's weights into a directory; a model that lies inside it may move with it.

        Raises:
            StorageError: a file could not be written.
        """
        folder, model = Path(path), self.model
        self.controller.save_pretrained(folder / CONTROLLER_FOLDER)
        self.pacing.guardrail.estimator.save(folder / ESTIMATOR_NAME)
        self.pacing.guardrail.save(folder / GUARDRAIL_NAME)
        listed = list(_LISTED)
        if self.pacing.output_length is not None:
            self.pacing.output_length.save(folder / OUTPUT_LENGTH_NAME)
            listed.append(OUTPUT_LENGTH_NAME)
        if self.prices is not None:
            self.prices.save(folder / PRICES_NAME)
            listed.append(PRICES_NAME)
        if self.predictor is not None:
            self.predictor.save(folder / PREDICTOR_NAME)
            listed.append(PREDICTOR_NAME)
        source, absolute_path = self.model_path, None
        if source != "embedded":
            absolute_path = os.path.abspath(source)
            # A run's bundle is a folder of its run directory, with which it moves.
            source, _ = portable_path(source, folder, folder.absolute().parent)
        content = {
            "model": {
                "path": source,
                "absolute_path": absolute_path,
                "identity": model.identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "stage2_after": model.stage2_after,
                "block_order": model.order.source,
                "vision_budgets": model.vision_budgets,
                "max_new_tokens": model.max_new_tokens,
            },
            "picture": config_to_dict(model.picture_config),
            "knob_space": model.knob_space.to_dict(),
            "full_p50_ms": self.full_p50_ms,
            "budget_kind": self.kind,
            "num_threads": self.num_threads,
            "files": {name: sha256_file(folder / name) for name in listed},
        }
        # Last, so that a bundle that can be opened is whole: until then it lists what the files were before.
        save_artefact(folder / BUNDLE_FILE, KIND, SCHEMA_VERSION, content, CheckpointError)

    @property
    def default_price(self) -> float:
        """The price of time where none is given: as calibrated, or none."""
        return 0.0 if self.prices is None else self.prices.default_price

    def price_for(self, *, mean_ms: float | None = None, points: float | None = None) -> PricePoint:
        """The price for a wanted mean latency, or for a tolerated loss of accuracy, and what it costs and saves.

        Both are as measured on validation examples whose budget hardly ever binds, with 95 % intervals.

        Args:
            mean_ms: mean milliseconds that requests may take on the machine as profiled; the lowest price that keeps
                it.
            points: points of accuracy that it may cost; the highest price that keeps it.

        Raises:
            ConfigError: not one of the two was given or it is no such number, no price is so fast, or prices were not
                calibrated.
        """
        if self.prices is None:
            raise ConfigError("prices were not calibrated with this controller; train and calibrate it again")
        return self.prices.choose(mean_ms=mean_ms, points=points)

    def answer(
        self,
        image: ImageSource | None,
        question: str,
        budget_ms: float = 80.0,
        policy: Policy | None = None,
        *,
        price: float | None = None,
        kind: BudgetKind | None = None,
        other_budget_ms: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answer a question about an image within a latency budget, which counts from this call.

        Args:
            image: path, bytes, PIL image or uint8 array. None asks the question alone: nothing was learned of that, so
                the most runs that the guardrail admits, whatever the price.
            question: the user's text.
            budget_ms: milliseconds for what the bundle's budgets cover, by default the whole request.
            policy: chooses the knobs in place of the bundle's own, for example `ControllerPolicy(pacer.controller)`.
            price: what time is worth below the budget: points of accuracy for one whole full latency. 0 spends the
                budget wherever that may help; None takes `default_price`.
            kind: what the budget covers, if not what the bundle's do.
            other_budget_ms: budget of the other kind, where both must hold.
            max_new_tokens: most tokens of the answer; it makes the bounds lower.

        Raises:
            BudgetError: a budget is not a positive, finite number.
            ImageError: the image cannot be read or used.
            QuestionError: the question is empty, too long or not text.
            ConfigError: `policy` is no policy, the price is no number from 0 to `MAX_PRICE`, the kind is unknown, or
                `max_new_tokens` is no whole number from 1.
        """
        own = self.policy if image is not None else MostPolicy(self.model.knob_space)
        chosen = own if policy is None else policy
        if not isinstance(chosen, Policy):
            raise ConfigError(
                f"policy is {policy!r}; give an object with name, choose_tier, latency_token, choose_compute"
            )
        called = time.perf_counter()
        price = self.default_price if price is None else price
        objective = Objective(budget_ms, self.kind if kind is None else kind, price, other_budget_ms)
        with self._running, use_num_threads(self.num_threads):
            waited_ms = (time.perf_counter() - called) * 1e3
            return run_request(
                self.model,
                chosen,
                image,
                question,
                objective,
                self.pacing,
                drift=self.drift,
                waited_ms=waited_ms,
                max_new_tokens=max_new_tokens,
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
        guardrail, kind = self.pacing.guardrail, self.kind
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

    def estimate(self, image: ImageSource | None, question: str) -> tuple[Estimate, ...]:
        """Latency of a request under every configuration, in the order of the knob space; runs nothing.

        Raises:
            ImageError, QuestionError: the input cannot be used.
        """
        with torch.inference_mode():
            view = self.model.view(image, question)
        estimator = self.pacing.guardrail.estimator
        predicted_ms = estimator.predict_many([view.sizes], self.pacing.output_tokens_upper([view]), self.kind)
        bounds_ms = self.pacing.upper_bounds_ms([view], self.kind) * (1.0 if self.drift is None else self.drift.factor)
        return tuple(
            Estimate(knobs, float(predicted), float(bound))
            for knobs, predicted, bound in zip(
                self.model.knob_space, np.ravel(predicted_ms), np.ravel(bounds_ms), strict=True
            )
        )


def read_prices(path: str | os.PathLike[str]) -> PriceTable:
    """What prices cost and save with a bundle's controller, without loading a model.

    Args:
        path: as `Pacer.from_pretrained` takes it.

    Raises:
        CheckpointError: the bundle or its prices are missing or damaged.
    """
    folder = bundle_folder(path)
    if PRICES_NAME not in read_bundle(folder)["files"]:
        raise CheckpointError(f"the bundle {folder} has no calibrated prices; train and calibrate again")
    return PriceTable.load(folder / PRICES_NAME)


def bundle_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that holds a bundle, as `Pacer.from_pretrained` is given it; raises CheckpointError."""
    for folder in (Path(path), Path(path) / BUNDLE_FOLDER):
        if (folder / BUNDLE_FILE).is_file():
            return folder
    raise CheckpointError(
        f"there is no {BUNDLE_FILE} in {os.fspath(path)} or its folder {BUNDLE_FOLDER!r}; give a directory that "
        "save_pretrained wrote, or that of a finished run"
    )


class _Model(TypedDict):
    path: Text
    absolute_path: Text | None
    identity: Text
    dtype: Literal["float32", "bfloat16", "float16"]
    stage2_after: Annotated[int, Range(1, 10_000)]
    block_order: Text
    vision_budgets: VisionBudgets
    max_new_tokens: NewTokens


class _Bundle(TypedDict):
    """What `bundle.json` holds."""

    model: _Model
    picture: PictureConfig
    knob_space: KnobSpace
    full_p50_ms: Ms
    budget_kind: BudgetKind
    num_threads: Annotated[int, Range(1, MAX_NUM_THREADS)] | None
    files: dict[Text, Sha256]


def read_bundle(folder: Path) -> dict[str, Any]:
    """The values of a bundle, whose files are whole; raises CheckpointError."""
    path = folder / BUNDLE_FILE
    values: dict[str, Any] = load_artefact(path, KIND, SCHEMA_VERSION, CheckpointError)
    values = typed(_Bundle, values, str(path), CheckpointError)
    listed = set(values["files"])
    if not set(_LISTED) <= listed <= {*_LISTED, OUTPUT_LENGTH_NAME, PRICES_NAME, PREDICTOR_NAME}:
        raise CheckpointError(f"{path} lists the files {sorted(listed)}, not {sorted(_LISTED)}; save the bundle again")
    for name, digest in values["files"].items():
        if not (folder / name).exists():
            raise CheckpointError(f"the bundle {folder} lacks the file {name}; copy the whole folder again")
        if sha256_file(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is not the file that the bundle was written with: it was damaged or replaced; copy "
                "the whole folder again, or save the bundle again"
            )
    return values


def _check_scale(folder: Path, model: ElasticModel, pacing: Pacing, kind: BudgetKind, full_p50_ms: float) -> None:
    """Refuse bounds on the full configuration that the measured median has nothing to do with."""
    height = width = 336
    vision = model.vision_sizes(height, width)
    estimator = pacing.guardrail.estimator
    picture_kind, picture = min(estimator.pictures.items())
    sizes = RequestSizes(
        vision,
        num_text_tokens=min(32, estimator.max_text_tokens),
        num_pixels=min(height * width, picture.max_pixels),
        picture_kind=picture_kind,
        num_bytes=min(100_000, picture.max_bytes),
    )
    bound_ms = float(pacing.guardrail.upper_bounds_ms(sizes, pacing.max_new_tokens, kind).max())
    if not 1 / MAX_BOUND_RATIO <= bound_ms / full_p50_ms <= MAX_BOUND_RATIO:
        raise CheckpointError(
            f"the bundle {folder} bounds a small request of the full configuration by {bound_ms:.3g} ms, but says that "
            f"it takes {full_p50_ms:.3g} ms (full_p50_ms); train and calibrate again"
        )


def find_bundle_model(settings: dict[str, Any], bundle: Path) -> str:
    """Where the model is that a bundle was saved with, now that both may have moved.

    Args:
        settings: what the bundle says of the model.
        bundle: its folder.
    """
    if settings["path"] == "embedded":
        return "embedded"
    return find_portable(settings["path"], settings["absolute_path"], bundle)
