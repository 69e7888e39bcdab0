"""A study: controllers of several seeds under several profiles, judged with every other policy on the same questions.

    STUDY/crossed/outcomes.sqlite               what the model answered, shared by all runs (symbolic links)
    STUDY/crossed/profiles/*.json               profiles: given ones, by name, and measured0, measured1 ... behind them
    STUDY/crossed/PROFILE/seed0/                an ordinary run directory, trained and not calibrated
    STUDY/crossed/PROFILE/records.safetensors   what every policy did, under the profile's replayed clock
    STUDY/worth.json                            the tables, made from the records

Nothing that is done is done again. Two processes may work on different traffics; a last start with all of them, which
finds their records, writes all tables.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.config import DataConfig, HeadroomConfig, LookupConfig, ProfileConfig, StudyConfig
from pacevlm.controller.policy import ControllerPolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import ConfigError, DataError
from pacevlm.evaluation.headroom import measure_headroom
from pacevlm.evaluation.held_out import KNOBS
from pacevlm.evaluation.sweep import (
    build_oracle,
    build_requests,
    choose_knobs,
    exhaustive_sweep,
    fit_baselines,
    predict_ms,
    run_prices,
)
from pacevlm.evaluation.worth import CONTROLLER, PREDICTOR, REBASED, TABLE, StudyRecords, measure_worth
from pacevlm.files import read_json, sha256_file, write_atomic, write_json_atomic
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.profile import Profile
from pacevlm.latency.replay import ReplayedClock
from pacevlm.pipeline.artefacts import OUTCOMES_NAME, PROFILE_GUARDRAIL_NAME, PROFILE_NAME
from pacevlm.pipeline.context import Reporter, RunContext, SilentReporter
from pacevlm.pipeline.headroom import gather
from pacevlm.pipeline.run import run_pipeline
from pacevlm.pipeline.run_config import RunConfig, load_run_config, train_defaults
from pacevlm.request.pacing import Pacing
from pacevlm.rollout.outcome_store import copy_store
from pacevlm.training.run_record import source_commit
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Example, Objective

WORTH_NAME, RECORDS_NAME, MEASURED = "worth.json", "records.safetensors", "measured"
# The settings that records depend on, besides their profile and the ablations.
_OF_RECORDS = ("model", "num_seeds", "num_train", "num_test", "steps", "batch_size", "alpha")
# What a training is without, beside the first profile: how its settings differ.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-mask": {"mask": False},
    "no-multiplier": {"constraint": {"k_p": 0.0, "k_i": 0.0}},
    "no-latency-token": {"blind_to": ("latency_token",)},
    "no-question": {"blind_to": ("question",)},
    "no-prices": {"max_price": 0.0},
    "no-tightening": {"max_tightening": 1.0},
    "group-scaling": {"grpo": {"scale_rewards": "group"}},
    "reinforce": {"grpo": {"baseline": "batch"}},
}


def run_study(config: StudyConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Do what is missing of a study, and write its tables into `worth.json`; those of other traffics stay there.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        ConfigError: there is no such ablation.
        PacevlmError: whatever a run raises.
    """
    import sklearn  # noqa: F401  # before anything long runs

    unknown = sorted(set(config.ablations) - set(ABLATIONS))
    if unknown:
        raise ConfigError(f"there is no ablation {', '.join(unknown)}; use some of {', '.join(ABLATIONS)}")
    reporter = reporter or SilentReporter()
    path, worth = config.study_dir / WORTH_NAME, {}
    for traffic in config.traffics:
        study = _Traffic(config, traffic, reporter)
        profiles = study.profiles()
        found = measure_worth([study.judge(profile, profiles[0]) for profile in profiles])
        worth[traffic] = {"commit": source_commit() or "unknown", **found}
        known = read_json(path, "tables of a study", DataError) if path.exists() else {}
        write_json_atomic(path, known | worth)
    return worth


class _Traffic:
    """All runs on one kind of questions."""

    def __init__(self, config: StudyConfig, traffic: str, reporter: Reporter) -> None:
        self.config, self.traffic, self.reporter = config, traffic, reporter
        self.folder = config.study_dir / traffic
        self.data = DataConfig(mixture=traffic, num_train=config.num_train, num_test=config.num_test)
        self.last: RunContext | None = None

    def run_config(self, folder: Path, profile: ProfileConfig, seed: int = 0, **changes: Any) -> RunConfig:
        """An ordinary run on this traffic."""
        defaults = RunConfig()
        train = _changed(train_defaults(steps=self.config.steps, batch_size=self.config.batch_size), changes)
        return dataclasses.replace(
            defaults,
            run_dir=folder,
            model=dataclasses.replace(defaults.model, path=self.config.model),
            data=self.data,
            profile=dataclasses.replace(
                profile, num_lengths=min(profile.num_lengths, self.config.num_train), alpha=self.config.alpha
            ),
            lookup=LookupConfig(num_examples=self.config.num_train),
            train=dataclasses.replace(train, seed=seed),
        )

    def profiles(self) -> list[Path]:
        """The profiles, the reference first: those that were given, by name, and then as many as are missing."""
        folder = self.folder / "profiles"
        folder.mkdir(parents=True, exist_ok=True)
        given = [path for path in sorted(folder.glob("*.json")) if not re.fullmatch(rf"{MEASURED}\d+", path.stem)]
        number = max(0, self.config.num_profiles - len(given))
        return [*given[: self.config.num_profiles], *(self.measured_profile(folder, i) for i in range(number))]

    def measured_profile(self, folder: Path, number: int) -> Path:
        """A profile of this machine, measured now unless it is there."""
        path = folder / f"{MEASURED}{number}.json"
        if not path.exists():
            settings = ProfileConfig(num_samples=self.config.num_samples, repeats=self.config.repeats, seed=number)
            config = self.run_config(self.folder / f"profiling-{path.stem}", settings)
            run = run_pipeline(config, "profile", reporter=self.reporter)
            with write_atomic(path) as temporary:
                shutil.copyfile(run.run_dir / PROFILE_NAME, temporary)
        return path

    def train(self, profile: Path, seed: int, name: str = "", **changes: Any) -> Path:
        """The finished run directory of one training."""
        folder = self.folder / profile.stem / f"{name}seed{seed}"
        num_threads = Profile.load(profile).device.num_threads
        config = self.run_config(folder, ProfileConfig(source=str(profile), num_threads=num_threads), seed, **changes)
        _share(self.folder / OUTCOMES_NAME, folder / OUTCOMES_NAME)
        self.last = run_pipeline(config, "train", reporter=self.reporter, alike=self.last)
        return folder

    def judge(self, profile: Path, reference: Path) -> StudyRecords:
        """What every policy does with the test questions under one profile, from the folder where it is known."""
        config, path = self.config, self.folder / profile.stem / RECORDS_NAME
        seeds = range(config.num_seeds)
        ablations = config.ablations if profile == reference else ()
        ablated = range(min(config.num_seeds, 3))
        settings = {name: getattr(config, name) for name in _OF_RECORDS}
        header = settings | {"profile": sha256_file(profile), "ablations": list(ablations)}
        known = StudyRecords.load(path, header)
        if known is not None:
            return known
        runs = {f"{CONTROLLER} {seed}": self.train(profile, seed) for seed in seeds}
        for name in ablations:
            runs |= {f"{name} {seed}": self.train(profile, seed, f"{name}-", **ABLATIONS[name]) for seed in ablated}
        if profile != reference:
            runs |= {f"{REBASED} {seed}": self.train(reference, seed) for seed in seeds}
        records = _judge(
            RunContext(load_run_config(runs[f"{CONTROLLER} 0"]), self.reporter, alike=self.last),
            runs,
            profile,
            ablations,
            tuple(seeds),
        )
        records.save(path, header)
        return records


def _changed(train: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Settings with some replaced, nested ones by name."""
    flat = {
        name: dataclasses.replace(getattr(train, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(train, **flat)


def _share(store: Path, place: Path) -> None:
    """Let a run add to the outcomes of its traffic; on a file system without links it gets a copy.

    The link is symbolic: a database has to be opened under one name, which its journal is found by.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(place):
        return
    store.touch()
    try:
        place.symlink_to(os.path.relpath(store.resolve(), place.parent.resolve()))
    except OSError:
        copy_store(store, place)


def _judge(
    run: RunContext,
    folders: Mapping[str, Path],
    profile_path: Path,
    ablations: tuple[str, ...],
    seeds: tuple[int, ...],
) -> StudyRecords:
    engine, space, kind = run.engine, run.model.knob_space, run.config.train.budget_kind
    pacing, full_ms = run.pacing(PROFILE_GUARDRAIL_NAME), run.full_p50_ms
    clock = ReplayedClock(run.estimator, Profile.load(profile_path).samples, kind)
    train, test = list(run.splits.train[: run.config.lookup.num_examples]), list(run.splits.test)
    fractions = run.config.evaluate.budgets
    objectives = [Objective(fraction * full_ms, kind) for fraction in fractions]
    exhaustive_sweep(engine, train, run.count("training answers"))
    outcomes = exhaustive_sweep(engine, test, run.count("test answers"))
    requests = build_requests(engine, test, objectives, pacing)

    prices = run.config.train.prices
    baselines = fit_baselines(engine, train, objectives, pacing, full_ms=full_ms, prices=prices)
    policies: dict[str, Policy] = {policy.name: policy for policy in baselines}
    policies["oracle"] = build_oracle(engine, test, pacing, kind, full_ms)
    policies["predictor_of_sizes"] = _predictor_of_sizes(run, train, objectives[0], pacing)
    for name, folder in folders.items():
        controller = RunContext(load_run_config(folder), alike=run).controller().eval()
        policies[name] = ControllerPolicy(controller.rebased(full_ms, run.estimator.fingerprint))
    chosen: dict[str, list[list[Knobs]]] = {}
    for number, (name, policy) in enumerate(policies.items(), start=1):
        chosen[name] = [choose_knobs(policy, engine, test, row) for row in requests]
        run.reporter.progress("policies", number, len(policies))
    for knob in KNOBS:  # what the predictor makes of one knob, the others full
        mask = _one_knob_mask(knob, space)
        alone = [[_with_mask(request, mask) for request in row] for row in requests]
        chosen[f"predictor_{knob}"] = [choose_knobs(policies[PREDICTOR], engine, test, row) for row in alone]
    chosen["task_table"] = _task_choices(run, train, test, objectives, pacing, requests)

    accuracy, latency_ms = np.empty((2, len(chosen), len(fractions), len(test)))
    for p, by_budget in enumerate(chosen.values()):
        for b, knobs in enumerate(by_budget):
            answers = engine.run(list(zip(test, knobs, strict=True)))
            ratios = [clock.ratio(e.example_id, choice) for e, choice in zip(test, knobs, strict=True)]
            accuracy[p, b] = [answer.accuracy for answer in answers]
            latency_ms[p, b] = predict_ms(pacing, requests[b], answers) * ratios
    priced = [policies[TABLE], policies[PREDICTOR], *(policies[f"{CONTROLLER} {seed}"] for seed in seeds)]
    fronts = [
        run_prices(policy, engine, test, run.loose_objective, prices, pacing, run.count("prices of time"))
        for policy in priced
    ]
    return StudyRecords(
        profile=profile_path.stem,
        seeds=seeds,
        fractions=fractions,
        budgets_ms=tuple(objective.budget_ms for objective in objectives),
        prices=prices,
        policies=tuple(chosen),
        tasks=tuple(_task(example) for example in test),
        learnable=_learnable(run, train),
        ablations=ablations,
        accuracy=accuracy,
        latency_ms=latency_ms,
        feasible=np.array([[request.any_feasible for request in row] for row in requests]),
        front_accuracy=np.stack([front.accuracy for front in fronts]),
        front_ms=np.stack([front.latency_ms for front in fronts]),
        full_accuracy=outcomes[:, space.index(space.full)],
        knob_accuracy=np.stack([outcomes[:, space.index(knobs)] for knobs in _lowered(space)]),
    )


def _predictor_of_sizes(run: RunContext, train: Sequence[Example], objective: Objective, pacing: Pacing) -> Policy:
    """The predictor that every question looks the same to."""
    blind = [
        dataclasses.replace(
            request,
            view=dataclasses.replace(
                request.view, question_embedding=torch.zeros_like(request.view.question_embedding)
            ),
        )
        for request in build_requests(run.engine, train, [objective], pacing)[0]
    ]
    return PredictorPolicy.fit(run.model.knob_space, blind, exhaustive_sweep(run.engine, train))


def _one_knob_mask(knob: str, space: KnobSpace) -> NDArray[np.bool_]:
    """Configurations whose other knobs are full, `(tiers, top_ks, num_blocks)`."""
    others = [name for name in KNOBS if name != knob]
    alone = [all(getattr(knobs, name) == getattr(space.full, name) for name in others) for knobs in space]
    return np.reshape(alone, space.shape)


def _with_mask(request: PolicyInput, mask: NDArray[np.bool_]) -> PolicyInput:
    """The request with some configurations alone; where none of them fits, the cheapest of all, as ever."""
    feasible = request.feasible & mask
    any_feasible = request.any_feasible and bool(feasible.any())
    feasible[0, 0, 0] |= not any_feasible
    return dataclasses.replace(request, feasible=feasible, any_feasible=any_feasible)


def _lowered(space: KnobSpace) -> list[Knobs]:
    """Every knob at its lowest value, the others full."""
    full, cheapest = space.full, space.cheapest
    return [dataclasses.replace(full, **{knob: getattr(cheapest, knob)}) for knob in KNOBS]


def _task(example: Example) -> str:
    """What a question is of: its task where the traffic has tasks, else its family."""
    return str(example.metadata.get("task", example.metadata.get("family", "all")))


def _task_choices(
    run: RunContext,
    train: Sequence[Example],
    test: Sequence[Example],
    objectives: Sequence[Objective],
    pacing: Pacing,
    requests: Sequence[Sequence[PolicyInput]],
) -> list[list[Knobs]]:
    """A lookup table for each task, which no request tells: what knowing the task alone is worth."""
    tables: dict[str, LookupTable] = {}
    for task in sorted({_task(example) for example in test}):
        own = [example for example in train if _task(example) == task] or list(train)
        fitted = fit_baselines(run.engine, own, objectives, pacing, full_ms=run.full_p50_ms)
        tables[task] = next(policy for policy in fitted if isinstance(policy, LookupTable))
    return [[tables[_task(e)].choose(request) for e, request in zip(test, row, strict=True)] for row in requests]


def _learnable(run: RunContext, train: list[Example]) -> dict[str, float]:
    """What headroom calls learnable on the training questions, points with their interval."""
    swept, _ = gather(run, HeadroomConfig(latency_token=False, num_moved=0), train)
    found = measure_headroom(swept, run.config.evaluate.budgets, progress=run.count("fits"))["learnable"]
    if found is None:
        raise ConfigError("headroom found nothing to measure on the training questions")
    return {name: 100 * value for name, value in found.items()}
