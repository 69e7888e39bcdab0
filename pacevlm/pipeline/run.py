"""The steps of a run in order: profile, lookup, train, calibrate, evaluate. Each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pacevlm.config import config_to_dict, save_config
from pacevlm.errors import ConfigError, IdentityError
from pacevlm.pipeline.artefacts import CONFIG_NAME, remove_artefacts
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.pipeline.step_log import FinishedStep, StepLog
from pacevlm.pipeline.steps import calibrate_step, evaluate_step, lookup_step, profile_step, train_step

_FUNCTIONS: dict[str, Callable[[RunContext], dict[str, Any]]] = {
    "profile": profile_step,
    "lookup": lookup_step,
    "train": train_step,
    "calibrate": calibrate_step,
    "evaluate": evaluate_step,
}
STEPS = tuple(_FUNCTIONS)
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

    An interrupted run goes on where it was: timed requests, outcomes and training steps so far are kept.

    Args:
        config: all settings.
        until: the last step, one of `STEPS`.
        fresh: remove what an earlier run left and start over.
        reporter: is told what happens.
        command: the command line that asked, for the report.

    Returns:
        The run's parts, all loaded or to be loaded from its directory.

    Raises:
        ConfigError: the run directory was made with other settings, or there is no such step.
        IdentityError: the run directory was made for another model or device.
        PacevlmError: whatever a step raises.
    """
    if until not in STEPS:
        raise ConfigError(f"there is no step {until!r}; the steps are {', '.join(STEPS)}")
    if fresh:
        remove_artefacts(config)
    run = RunContext(config, reporter, command)
    log = StepLog(config.run_dir)
    _check_settings(run, log)
    save_config(config.run_dir / CONFIG_NAME, config)
    for name in STEPS[: STEPS.index(until) + 1]:
        settings = step_settings(run, name)
        done = log.get(name)
        changes = _changes(done, settings)
        if done is not None and not changes:
            run.reporter.skipped(name, done.facts)
            continue
        if changes:
            run.reporter.remark(f"{name} is done again: {'; '.join(changes)}")
        run.reporter.started(name)
        log.remove(name, *_DEPENDENT[name])
        started = time.monotonic()
        facts = _FUNCTIONS[name](run)
        seconds = time.monotonic() - started
        log.add(name, settings, seconds, facts)
        run.reporter.finished(name, seconds, facts)
    return run


def step_settings(run: RunContext, step: str) -> dict[str, Any]:
    """All that a step's outcome depends on, ready for JSON."""
    config, identity = run.config, run.data_identity
    # What the parts hold, not where they were read: a changed line or picture counts, a moved file does not.
    data: dict[str, Any] = {"train": identity.get("train")}
    model = {"identity": run.model.identity, "knob_space": run.model.knob_space.to_dict()}
    settings: dict[str, Any] = {"model": model, "data": data}
    if step != "profile":  # which scores nothing
        data["metric"] = identity.get("metric")
    if step == "lookup":
        return settings | {"lookup": config_to_dict(config.lookup)}
    settings |= {"profile": config_to_dict(config.profile), "controller": config_to_dict(config.controller)}
    if step == "profile":
        return settings
    settings["train"] = config.train.identity()
    if step == "train":
        return settings
    settings["calibrate"] = config_to_dict(config.calibrate)
    data["val"] = identity.get("val")
    if step == "calibrate":
        return settings
    data["test"] = identity.get("test")
    return settings | {"lookup": config_to_dict(config.lookup), "evaluate": config_to_dict(config.evaluate)}


def _changes(done: FinishedStep | None, settings: dict[str, Any]) -> list[str]:
    """What a finished step was done with that is different now, in words."""
    changes = done.changes(settings) if done is not None else []
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        text = f"the {name} examples changed (a line, a reference, a question or a picture of the data set)"
        changes = [text if change.startswith(f"data.{part}.sha256 ") else change for change in changes]
    return changes


def _check_settings(run: RunContext, log: StepLog) -> None:
    for name in _KEPT:
        done = log.get(name)
        changes = _changes(done, step_settings(run, name))
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
