"""What the steps of a run share: its settings, and the parts that its directory holds so far."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.config import DataConfig
from pacevlm.controller.policy import Controller, ControllerPolicy
from pacevlm.controller.policy_interface import Policy
from pacevlm.data.splits import Splits, load_splits
from pacevlm.dataset_list import parse_datasets, with_paths
from pacevlm.errors import ConfigError, DataError, IdentityError, PacevlmError
from pacevlm.files import sha256_file
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.pipeline.artefacts import (
    CONTROLLER_NAME,
    ESTIMATOR_NAME,
    GUARDRAIL_NAME,
    OUTCOMES_NAME,
    OUTPUT_LENGTH_NAME,
    PREDICTOR_NAME,
    PROFILE_GUARDRAIL_NAME,
)
from pacevlm.pipeline.loading import load_on_ranks
from pacevlm.pipeline.run_config import RunConfig, load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.request.pacing import Pacing
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.outcome_store import OutcomeStore
from pacevlm.rollout.ranks import current_ranks
from pacevlm.types import Objective

# Training questions whose bounds say how large budgets are.
NUM_BOUNDED = 256


def _wherever(data: DataConfig) -> dict[str, Any]:
    """The settings without the metric, and without the folders of files."""
    settings = dataclasses.asdict(data) | {"metric": None, "dataset": None}
    named = {name: os.path.basename(value) if isinstance(value, str) else value for name, value in settings.items()}
    return named | {"dataset": with_paths(data.dataset, os.path.basename)}


class Reporter(Protocol):
    """What is told of a run while it works."""

    def started(self, step: str) -> None:
        """A step begins."""

    def missing(self, step: str, names: Sequence[str]) -> None:
        """Files of a finished step are gone from the run directory, and are made again."""

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        """A step was finished by an earlier run with the same settings."""

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        """A step ended well, with what it found."""

    def warned(self, step: str, sentence: str) -> None:
        """Something that should be known: what makes a step's outcome of little use, or what was left out or changed.

        `step` is `data` for what the data set itself has to say.
        """

    def told(self, step: str, sentence: str) -> None:
        """What is known of a step before it is done: what it takes."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of a piece of work are done; `note` holds a few current numbers."""


class SilentReporter:
    """Tells nobody; see `Reporter`."""

    def started(self, step: str) -> None:
        """Nothing."""

    def missing(self, step: str, names: Sequence[str]) -> None:
        """Nothing."""

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def warned(self, step: str, sentence: str) -> None:
        """Nothing."""

    def told(self, step: str, sentence: str) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Nothing."""


class RunContext:
    """The parts of one run, each loaded when it is first wanted.

    Args:
        config: all settings.
        reporter: is told what happens.
        command: the command line that asked, for the report.
        alike: a run with the same model, data and outcomes, whose loaded parts are used: its engine keeps the first
            block's work on each question.

    Raises:
        ConfigError: `alike` has another model or other data.
    """

    def __init__(
        self,
        config: RunConfig,
        reporter: Reporter | None = None,
        command: str | None = None,
        alike: RunContext | None = None,
    ) -> None:
        self.config, self.reporter, self.command = config, reporter or SilentReporter(), command
        self.run_dir = config.run_dir
        if alike is not None:
            if any(getattr(config, part) != getattr(alike.config, part) for part in ("model", "data", "picture")):
                raise ConfigError(f"{config.run_dir} has another model or other data than {alike.run_dir}")
            self.model, self.splits, self.engine = alike.model, alike.splits, alike.engine

    @cached_property
    def model(self) -> ElasticModel:
        """The frozen model."""
        return load_on_ranks(self.config.model, self.config.picture, self.config.data.dataset)

    @cached_property
    def splits(self) -> Splits:
        """The data set in three parts."""
        splits = load_splits(self.config.data, self.config.picture, self.count("examples read"))
        for sentence in splits.remarks:
            self.reporter.warned("data", sentence)
        return splits

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """What each part holds, and the metric's name, wherever the files lie.

        Of files and folders that are not here any more it is what the finished steps say, unless other data are asked
        for: these steps need them no longer, and a step that does says what is missing.
        """
        data = self.config.data
        finished = StepLog(self.run_dir).data_settings()
        named = (*(entry.path for entry in parse_datasets(data.dataset)), data.val_dataset, data.test_dataset)
        gone = not all(os.path.exists(name) for name in named if name is not None)
        if finished and gone and _wherever(data) == _wherever(load_run_config(self.run_dir).data):
            return finished | ({} if data.metric is None else {"metric": data.metric})
        return {**self.splits.identity, "metric": self.splits.metric.name}

    @cached_property
    def engine(self) -> RolloutEngine:
        """The rollout engine, with the run directory's outcome store."""
        with saying_how_to_go_on():
            store = OutcomeStore(self.model.identity, self.run_dir / OUTCOMES_NAME)
        return RolloutEngine(self.model, self.splits.metric, store, ranks=current_ranks())

    @cached_property
    def estimator(self) -> LatencyEstimator:
        """The fitted estimator; raises IdentityError if it was fitted for another model or device."""
        with use_num_threads(self.config.profile.num_threads):
            facts = collect_device_facts(self.model.device, self.model.dtype, compiler=self.model.adapter.compiler)
        with saying_how_to_go_on():
            wanted = dataclasses.replace(self.model.made_for, device=facts.identity)
            return LatencyEstimator.load(self.run_dir / ESTIMATOR_NAME, wanted)

    def pacing(self, guardrail_name: str = GUARDRAIL_NAME) -> Pacing:
        """Guardrail and output lengths as the run directory holds them."""
        estimator = self.estimator
        with saying_how_to_go_on():
            lengths = OutputLengthModel.load(self.run_dir / OUTPUT_LENGTH_NAME, self.model.made_for)
            guardrail = Guardrail.load(self.run_dir / guardrail_name, estimator)
        return Pacing(guardrail, lengths, self.model.max_new_tokens)

    def controller(self) -> Controller:
        """The trained controller."""
        estimator = self.estimator
        with saying_how_to_go_on():
            wanted = dataclasses.replace(estimator.made_for, d_model=self.model.d_model)
            return Controller.from_pretrained(self.run_dir / CONTROLLER_NAME, wanted, device=self.model.device)

    def predictor(self) -> PredictorPolicy:
        """The fitted predictor."""
        with saying_how_to_go_on():
            return PredictorPolicy.load(self.run_dir / PREDICTOR_NAME, self.model.knob_space)

    def policy(self) -> Policy:
        """What the bundle answers with."""
        if self.config.calibrate.policy == "predictor":
            return self.predictor()
        return ControllerPolicy(self.controller().eval())

    @property
    def full_p50_ms(self) -> float:
        """Median latency of the full configuration, of the kind that budgets cover: the budget of fraction 1."""
        step = StepLog(self.run_dir).get("profile")
        if step is None:
            raise DataError(f"{self.run_dir} holds no finished profile; run `pacevlm profile` first")
        return float(step.facts["full_p50_ms"][self.config.train.budget_kind])

    @cached_property
    def full_bound_ms(self) -> float:
        """The profile's bound on the full configuration, median over training questions.

        Budgets of training are fractions of it. A profile from a noisy hour has wide bounds, and fractions of the
        median latency would then admit little or nothing most of the time.
        """
        pacing = self.pacing(PROFILE_GUARDRAIL_NAME)
        views = [self.engine.view(example) for example in self.splits.train[:NUM_BOUNDED]]
        bounds_ms = pacing.upper_bounds_ms(views, self.config.train.budget_kind)[:, -1, -1, -1]
        promised_ms = bounds_ms[np.isfinite(bounds_ms)]
        if not len(promised_ms):
            why = pacing.guardrail.estimator.beyond(views[0].sizes)
            raise DataError(
                f"no training question is within what was profiled: {why}; profile anew with requests like it"
            )
        return float(np.median(promised_ms))

    @property
    def loose_objective(self) -> Objective:
        """The largest budget of training, which hardly ever binds, and no price."""
        train = self.config.train
        return Objective(train.max_budget * self.full_bound_ms, train.budget_kind)

    @cached_property
    def source_identity(self) -> str | None:
        """Digest of the profile that `profile.source` names, wherever it lies; None if it names none.

        One that is not here any more is the one that the finished profile step was made with: later steps need it no
        longer, and a step that does says that it is missing.
        """
        path = self.config.profile.source
        if path is None:
            return None
        if not os.path.isfile(path):
            step = StepLog(self.run_dir).get("profile")
            return path if step is None else str(step.settings["profile"].get("source", path))
        return f"sha256 {sha256_file(path, DataError)}"

    def count(self, what: str) -> Callable[[int, int], None]:
        """A callback that reports the progress of one piece of work."""
        return lambda done, total: self.reporter.progress(what, done, total)


@contextmanager
def saying_how_to_go_on() -> Iterator[None]:
    """Add to the error about a damaged file of the run directory what to do about it."""
    try:
        yield
    except IdentityError:
        raise
    except PacevlmError as error:
        raise type(error)(
            f"{error}. Remove the file, and the same command makes it again, or start over with --fresh"
        ) from error
