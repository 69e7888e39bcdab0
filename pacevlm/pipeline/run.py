"""The steps of a run in order: profile, lookup, train, calibrate, evaluate. Each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pacevlm.config import config_to_dict
from pacevlm.devices import resolve_device
from pacevlm.errors import ConfigError, DataError, IdentityError
from pacevlm.knobs import KnobSpace
from pacevlm.latency.measuring import check_num_threads
from pacevlm.models.folder import find_model_folder
from pacevlm.pipeline.artefacts import (
    PARTIAL_NAMES,
    check_directory,
    made_files,
    missing_files,
    remove_artefacts,
    remove_file,
    remove_leftovers,
    source_files,
)
from pacevlm.pipeline.checks import check_run
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.lock import one_writer
from pacevlm.pipeline.outputs import draw_outputs
from pacevlm.pipeline.run_config import RunConfig, save_run_config
from pacevlm.pipeline.step_log import FinishedStep, StepLog
from pacevlm.pipeline.steps import (
    calibrate_step,
    evaluate_step,
    fit_profile,
    lookup_step,
    profile_step,
    train_step,
    write_bundle,
)
from pacevlm.rollout.ranks import current_ranks

_FUNCTIONS: dict[str, Callable[[RunContext], dict[str, Any]]] = {
    "profile": profile_step,
    "lookup": lookup_step,
    "train": train_step,
    "calibrate": calibrate_step,
    "evaluate": evaluate_step,
}
STEPS = tuple(_FUNCTIONS)
# Makes what a step leaves from its source files alone, the same as before.
_AGAIN: dict[str, Callable[[RunContext], Any]] = {
    "profile": fit_profile,
    "lookup": lookup_step,
    "train": train_step,
    "calibrate": write_bundle,
    "evaluate": lambda run: draw_outputs(run.config),
}
# What is out of date once a step has been done again.
_DEPENDENT: dict[str, tuple[str, ...]] = {
    "profile": ("train", "calibrate", "evaluate"),
    "lookup": ("calibrate", "evaluate"),
    "train": ("calibrate", "evaluate"),
    "calibrate": ("evaluate",),
    "evaluate": (),
}
# The fact of a training that was taken over from another run: the digest of its controller's weights.
REBASED = "rebased_from"
# Once these are finished, other settings would orphan what the later steps made of them.
_KEPT = ("profile", "train")


def run_pipeline(
    config: RunConfig,
    until: str = "evaluate",
    *,
    fresh: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
    alike: RunContext | None = None,
) -> RunContext:
    """Run all steps up to one; those that the run directory holds with the same settings are not run again.

    An interrupted run goes on where it was: timed requests, outcomes and training steps so far are kept. A finished
    step is one whose files are there: what is missing of them is made again. Nothing else may write into the run
    directory meanwhile.

    Args:
        config: all settings.
        until: the last step, one of `STEPS`.
        fresh: remove what an earlier run left and start over.
        reporter: is told what happens.
        command: the command line that asked, for the report.
        alike: a run of the same model, data and outcomes, whose loaded parts are used.

    Returns:
        The run's parts, all loaded or to be loaded from its directory.

    Raises:
        ConfigError: the run directory was made with other settings, is in use or is something else's; or there is no
            such step or device, or fewer CPUs than threads.
        IdentityError: the run directory was made for another model or device.
        PacevlmError: whatever a step raises.
    """
    if until not in STEPS:
        raise ConfigError(f"there is no step {until!r}; the steps are {', '.join(STEPS)}")
    resolve_device(config.model.device)
    config = with_model_folder(config)
    check_num_threads(config.profile.num_threads)
    check_directory(config, fresh=fresh)
    wanted = STEPS[: STEPS.index(until) + 1]
    run = RunContext(config, reporter, command, alike)
    is_new = fresh or not config.run_dir.exists()
    if is_new:  # before anything is removed or made
        check_run(run, wanted)
    with one_writer(config.run_dir):
        if fresh:
            remove_artefacts(config)
        remove_leftovers(config)
        log = StepLog(config.run_dir)
        _check_settings(run, log)
        # Before any is made again: one step's work may leave half of what another's was.
        gone = {name: _missing(run, name) for name in STEPS}
        if not is_new:
            check_run(run, [name for name in wanted if gone[name][0] or not _is_done(run, log, name)])
        save_run_config(config)
        for name in wanted:
            if not _is_finished(run, log, name, *gone[name]):
                _do(run, log, name)
    return run


def with_model_folder(config: RunConfig) -> RunConfig:
    """Let a run remember the folder that a hub id or a hub cache means now: nothing else there can change its model."""
    folder = find_model_folder(config.model.path)
    if config.model.path == "embedded" or folder == Path(config.model.path):
        return config
    return replace(config, model=replace(config.model, path=str(folder)))


def _missing(run: RunContext, name: str) -> tuple[list[str], list[str]]:
    """The source files of a step that are not there, and those that it makes of them."""
    return (
        missing_files(run.run_dir, source_files(run.config, name)),
        missing_files(run.run_dir, made_files(run.config, name)),
    )


def _is_done(run: RunContext, log: StepLog, name: str) -> bool:
    """Whether a step was done with the same settings."""
    done = log.get(name)
    return done is not None and not done.changes(step_settings(run, name))


def _is_finished(run: RunContext, log: StepLog, name: str, sources: list[str], made: list[str]) -> bool:
    """Whether a step was done with the same settings and its files are there; those that can be are made again."""
    done = log.get(name)
    if done is None or done.changes(step_settings(run, name)):
        return False
    if sources or made:
        if REBASED in done.facts:
            raise DataError(
                f"{run.run_dir} lacks {', '.join(sources + made)}, and its controller was rebased, not trained there; "
                "remove the folder and rebase it again"
            )
        run.reporter.missing(name, sources + made)
    if sources:
        return False
    if made:
        _AGAIN[name](run)
    run.reporter.skipped(name, done.facts)
    _warn(run, name, done.facts)
    return True


def _do(run: RunContext, log: StepLog, name: str) -> None:
    """Run one step, from where it was stopped if it was."""
    settings = step_settings(run, name)  # a model that cannot be loaded is no step that began
    changes = _changes(log.get(name), settings)
    if changes:
        run.reporter.warned(name, f"{name} is done again: {'; '.join(changes)}")
    run.reporter.started(name)
    log.remove(name, *_DEPENDENT[name])
    _remove_partial(run, *_DEPENDENT[name])
    started, ranks = time.monotonic(), current_ranks()
    before = [] if ranks is None else ranks.totals()
    facts = _FUNCTIONS[name](run)
    seconds = time.monotonic() - started
    if ranks is not None:
        work = zip(ranks.totals(), before, strict=True)
        facts["ranks"] = [asdict(now.since(earlier)) for now, earlier in work]
    log.add(name, settings, seconds, facts)
    # Only now: a stop before this line finds all that was measured.
    _remove_partial(run, name)
    run.reporter.finished(name, seconds, facts)
    _warn(run, name, facts)


def _warn(run: RunContext, name: str, facts: Mapping[str, Any]) -> None:
    for sentence in facts.get("warnings", ()):
        run.reporter.warned(name, sentence)


def _remove_partial(run: RunContext, *steps: str) -> None:
    for step in steps:
        for name in PARTIAL_NAMES[step]:
            remove_file(run.run_dir / name)


def step_settings(run: RunContext, step: str, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that a step's outcome depends on, ready for JSON.

    Args:
        model: what identifies the model, where it is not to be loaded for that.
    """
    if model is None:
        model = {"identity": run.model.identity, "knob_space": run.model.knob_space.to_dict()}
    config, identity = run.config, run.data_identity
    # What the parts hold, not where they were read: a changed line or picture counts, a moved file does not.
    data: dict[str, Any] = {"train": identity.get("train")}
    settings: dict[str, Any] = {"model": model, "data": data, "picture": config_to_dict(config.picture)}
    if step != "profile":  # which scores nothing
        data["metric"] = identity.get("metric")
    if step == "lookup":
        return settings | {"lookup": config_to_dict(config.lookup)}
    profile = config_to_dict(config.profile) | {"source": run.source_identity}
    settings |= {"profile": profile, "controller": config_to_dict(config.controller)}
    if step == "profile":
        return settings
    settings["train"] = config.train.identity()
    if step == "train":
        return settings
    settings |= {"calibrate": config_to_dict(config.calibrate), "lookup": config_to_dict(config.lookup)}
    data["val"] = identity.get("val")
    if step == "calibrate":
        return settings
    data["test"] = identity.get("test")
    return settings | {"evaluate": config_to_dict(config.evaluate)}


def _changes(done: FinishedStep | None, settings: dict[str, Any]) -> list[str]:
    """What a finished step was done with that is different now, in words."""
    changes = done.changes(settings) if done is not None else []
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        text = f"the {name} examples changed (a line, a reference, a question or a picture of the data set)"
        changes = [text if change.startswith(f"data.{part}.sha256 ") else change for change in changes]
    return changes


def finished_steps(run: RunContext, space: KnobSpace) -> set[str]:
    """Steps that `run_pipeline` would find finished, if the model is still the one that they were done with.

    The model is not loaded.

    Args:
        space: the run's configurations.

    Raises:
        ConfigError, IdentityError: the run directory was made with other settings.
    """
    log = StepLog(run.run_dir)
    _check_settings(run, log, space)
    finished: set[str] = set()
    outdated: set[str] = set()
    for name in STEPS:
        done = log.get(name)
        is_there = done is not None and not missing_files(run.run_dir, source_files(run.config, name))
        if is_there and name not in outdated and not _changes(done, _settings_of(run, name, done, space)):
            finished.add(name)
        else:
            outdated.update(_DEPENDENT[name])
    return finished


def _settings_of(run: RunContext, name: str, done: FinishedStep | None, space: KnobSpace | None) -> dict[str, Any]:
    """A step's settings; with a knob space, for the model that it was done with."""
    if space is None:
        return step_settings(run, name)
    identity = None if done is None else done.settings.get("model", {}).get("identity")
    return step_settings(run, name, {"identity": identity, "knob_space": space.to_dict()})


def _check_settings(run: RunContext, log: StepLog, space: KnobSpace | None = None) -> None:
    for name in _KEPT:
        done = log.get(name)
        changes = _changes(done, _settings_of(run, name, done, space))
        if any(change.startswith("model.") for change in changes):
            raise IdentityError(
                f"{run.run_dir} was made for another model or knob space: {'; '.join(changes)}. Give another run "
                "directory, or start over with --fresh"
            )
        if changes:
            raise ConfigError(
                f"{run.run_dir} was made with other settings: {'; '.join(changes)}. Give what it was made with, "
                "another run directory, or start over with --fresh"
            )
