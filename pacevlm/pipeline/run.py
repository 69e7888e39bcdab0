"""The steps of a run in order: profile, lookup, train, calibrate, evaluate. Each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pacevlm.config import config_to_dict
from pacevlm.errors import ConfigError, IdentityError
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
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.lock import one_writer
from pacevlm.pipeline.outputs import draw_outputs
from pacevlm.pipeline.run_config import RunConfig, save_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.pipeline.steps import (
    calibrate_step,
    evaluate_step,
    fit_profile,
    lookup_step,
    profile_step,
    train_step,
    write_bundle,
)

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
    "lookup": ("evaluate",),
    "train": ("calibrate", "evaluate"),
    "calibrate": ("evaluate",),
    "evaluate": (),
}
# Once these are finished, other settings would orphan what the later steps made of them.
_KEPT = ("profile", "train")


def run_pipeline(
    config: RunConfig,
    until: str = "evaluate",
    *,
    fresh: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
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

    Returns:
        The run's parts, all loaded or to be loaded from its directory.

    Raises:
        ConfigError: the run directory was made with other settings, is in use or is something else's; or there is no
            such step.
        IdentityError: the run directory was made for another model or device.
        PacevlmError: whatever a step raises.
    """
    if until not in STEPS:
        raise ConfigError(f"there is no step {until!r}; the steps are {', '.join(STEPS)}")
    check_directory(config, fresh=fresh)
    with one_writer(config.run_dir):
        if fresh:
            remove_artefacts(config)
        remove_leftovers(config)
        run = RunContext(config, reporter, command)
        log = StepLog(config.run_dir)
        _check_settings(run, log)
        save_run_config(config)
        # Before any is made again: one step's work may leave half of what another's was.
        gone = {name: _missing(run, name) for name in STEPS}
        for name in STEPS[: STEPS.index(until) + 1]:
            if not _is_finished(run, log, name, *gone[name]):
                _do(run, log, name)
    return run


def _missing(run: RunContext, name: str) -> tuple[list[str], list[str]]:
    """The source files of a step that are not there, and those that it makes of them."""
    return (
        missing_files(run.run_dir, source_files(run.config, name)),
        missing_files(run.run_dir, made_files(run.config, name)),
    )


def _is_finished(run: RunContext, log: StepLog, name: str, sources: list[str], made: list[str]) -> bool:
    """Whether a step was done with the same settings and its files are there; those that can be are made again."""
    done = log.get(name)
    if done is None or done.changes(step_settings(run, name)):
        return False
    if sources or made:
        run.reporter.missing(name, sources + made)
    if sources:
        return False
    if made:
        _AGAIN[name](run)
    run.reporter.skipped(name, done.facts)
    return True


def _do(run: RunContext, log: StepLog, name: str) -> None:
    """Run one step, from where it was stopped if it was."""
    settings = step_settings(run, name)  # a model that cannot be loaded is no step that began
    run.reporter.started(name)
    log.remove(name, *_DEPENDENT[name])
    _remove_partial(run, *_DEPENDENT[name])
    started = time.monotonic()
    facts = _FUNCTIONS[name](run)
    seconds = time.monotonic() - started
    log.add(name, settings, seconds, facts)
    # Only now: a stop before this line finds all that was measured.
    _remove_partial(run, name)
    run.reporter.finished(name, seconds, facts)


def _remove_partial(run: RunContext, *steps: str) -> None:
    for step in steps:
        for name in PARTIAL_NAMES[step]:
            remove_file(run.run_dir / name)


def step_settings(run: RunContext, step: str) -> dict[str, Any]:
    """All that a step's outcome depends on, ready for JSON."""
    config = run.config
    data = config_to_dict(config.data) | {name: run.file_identity("data", name) for name in ("dataset", "test_dataset")}
    if config.data.dataset == "digits":  # whose parts do not depend on each other's sizes
        data = {
            name: value
            for name, value in data.items()
            if name not in ("num_val", "num_test", "skip_test", "test_dataset")
        }
    model = {"identity": run.model.identity, "knob_space": run.model.knob_space.to_dict()}
    settings: dict[str, Any] = {"model": model, "data": data}
    if step == "lookup":
        return settings | {"lookup": config_to_dict(config.lookup)}
    profile = config_to_dict(config.profile) | {"source": run.file_identity("profile", "source")}
    settings |= {"profile": profile, "controller": config_to_dict(config.controller)}
    if step == "profile":
        return settings
    settings["train"] = config.train.identity()
    if step == "train":
        return settings
    settings["calibrate"] = config_to_dict(config.calibrate) | {"num_val": config.data.num_val}
    if step == "calibrate":
        return settings
    settings |= {"lookup": config_to_dict(config.lookup), "evaluate": config_to_dict(config.evaluate)}
    files = {name: data[name] for name in ("dataset", "test_dataset") if name in data}
    return settings | {"data": config_to_dict(config.data) | files}


def _check_settings(run: RunContext, log: StepLog) -> None:
    for name in _KEPT:
        done = log.get(name)
        changes = done.changes(step_settings(run, name)) if done is not None else []
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
