"""The steps of a run in order: profile, lookup, train, calibrate, evaluate. Each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pacevlm.config import config_to_dict, save_config
from pacevlm.devices import resolve_device
from pacevlm.errors import ConfigError, IdentityError
from pacevlm.latency.measuring import check_num_threads
from pacevlm.pipeline.artefacts import CONFIG_NAME, remove_artefacts
from pacevlm.pipeline.checks import check_run
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.pipeline.step_log import StepLog
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
        ConfigError: the run directory was made with other settings, or there is no such step or device, or fewer CPUs
            than threads.
        IdentityError: the run directory was made for another model or device.
        PacevlmError: whatever a step raises.
    """
    if until not in STEPS:
        raise ConfigError(f"there is no step {until!r}; the steps are {', '.join(STEPS)}")
    resolve_device(config.model.device)
    check_num_threads(config.profile.num_threads)
    run = RunContext(config, reporter, command)
    wanted = STEPS[: STEPS.index(until) + 1]
    if fresh:
        check_run(run, wanted)
        remove_artefacts(config)
    log = StepLog(config.run_dir)
    _check_settings(run, log)
    if not fresh:
        check_run(run, [name for name in wanted if not _is_done(run, log, name)])
    save_config(config.run_dir / CONFIG_NAME, config)
    for name in wanted:
        settings = step_settings(run, name)
        done = log.get(name)
        if done is not None and not done.changes(settings):
            run.reporter.skipped(name, done.facts)
            _warn(run, name, done.facts)
            continue
        run.reporter.started(name)
        log.remove(name, *_DEPENDENT[name])
        started = time.monotonic()
        facts = _FUNCTIONS[name](run)
        seconds = time.monotonic() - started
        log.add(name, settings, seconds, facts)
        run.reporter.finished(name, seconds, facts)
        _warn(run, name, facts)
    return run


def _is_done(run: RunContext, log: StepLog, name: str) -> bool:
    done = log.get(name)
    return done is not None and not done.changes(step_settings(run, name))


def _warn(run: RunContext, name: str, facts: Mapping[str, Any]) -> None:
    for sentence in facts.get("warnings", ()):
        run.reporter.warned(name, sentence)


def step_settings(run: RunContext, step: str) -> dict[str, Any]:
    """All that a step's outcome depends on, ready for JSON."""
    config = run.config
    data = config_to_dict(config.data)
    if config.data.dataset == "digits":  # whose parts do not depend on each other's sizes
        data = {
            name: value
            for name, value in data.items()
            if name not in ("num_val", "num_test", "skip_test", "test_dataset")
        }
    model = {"identity": run.model.identity, "knob_space": run.model.knob_space.to_dict()}
    settings: dict[str, Any] = {"model": model, "data": data, "picture": config_to_dict(config.picture)}
    if step == "lookup":
        return settings | {"lookup": config_to_dict(config.lookup)}
    settings |= {"profile": config_to_dict(config.profile), "controller": config_to_dict(config.controller)}
    if step == "profile":
        return settings
    settings["train"] = config.train.identity()
    if step == "train":
        return settings
    settings["calibrate"] = config_to_dict(config.calibrate) | {"num_val": config.data.num_val}
    if step == "calibrate":
        return settings
    settings |= {"lookup": config_to_dict(config.lookup), "evaluate": config_to_dict(config.evaluate)}
    return settings | {"data": config_to_dict(config.data)}


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
