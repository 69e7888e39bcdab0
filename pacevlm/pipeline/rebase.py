"""A controller on another device, or on this one after it changed: profiled anew, calibrated anew, not trained anew.

A controller sees budgets, bounds and prices as multiples of the full latency, so what it learned carries over as far as
the knobs' relative costs do.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from pacevlm.controller.checkpoint import WEIGHTS_NAME
from pacevlm.controller.policy import Controller
from pacevlm.errors import ConfigError
from pacevlm.files import sha256_file
from pacevlm.pipeline.artefacts import CONTROLLER_NAME, OUTCOMES_NAME, PROFILE_NAME
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.lock import one_writer
from pacevlm.pipeline.run import REBASED, run_pipeline, step_settings
from pacevlm.pipeline.run_config import RunConfig, load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.rollout.outcome_store import copy_store
from pacevlm.training.trainer import CHECKPOINT_NAME, METRICS_NAME, RUN_NAME

_WEIGHTS = f"{CONTROLLER_NAME}/{WEIGHTS_NAME}"


def rebase_run(
    source: Path,
    run_dir: Path,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    transfer: bool = False,
    reporter: Reporter | None = None,
) -> RunConfig:
    """Make a run of another one's controller on this device; a second call goes on where the first was stopped.

    Args:
        source: a run whose controller is trained; it stays as it is.
        run_dir: the new run's folder.
        device: where the model runs; where it ran if None.
        num_threads: CPU threads of a request; as many as it had if None.
        transfer: carry the source's latencies over with a few measurements instead of a whole profile.

    Raises:
        ConfigError: the source holds no trained controller, the two are one folder, or the new one holds another
            controller or was begun with other settings.
        IdentityError: the model changed.
        PacevlmError: whatever a step raises.
    """
    config, trained = load_run_config(source), StepLog(source).get("train")
    if trained is None:
        raise ConfigError(f"{source} holds no trained controller; run `pacevlm train --run-dir {source}` first")
    if source.resolve() == run_dir.resolve():
        raise ConfigError(f"run_dir is {str(run_dir)!r}, the run that is rebased, which is kept; give another run_dir")
    there = StepLog(run_dir).get("train")
    if there is not None and there.facts.get(REBASED) != sha256_file(source / _WEIGHTS):
        raise ConfigError(f"{run_dir} holds a controller that is not of {source}; give another run_dir, or remove it")
    profile = dataclasses.replace(
        config.profile,
        source=str((source / PROFILE_NAME).absolute()) if transfer else None,
        transfer=transfer,
        num_threads=config.profile.num_threads if num_threads is None else num_threads,
    )
    model = dataclasses.replace(config.model, device=config.model.device if device is None else device)
    config = dataclasses.replace(config, run_dir=run_dir, profile=profile, model=model)
    is_new = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
    if is_new and (source / OUTCOMES_NAME).exists():
        # What the model answered is the same on every device.
        copy_store(source / OUTCOMES_NAME, run_dir / OUTCOMES_NAME)
    run = run_pipeline(config, "profile", reporter=reporter)
    with one_writer(run_dir):
        _keep_controller(run, source)
    run_pipeline(config, "calibrate", reporter=reporter)
    return config


def _keep_controller(run: RunContext, source: Path) -> None:
    """Take over a run's controller and the record of its training, unless that is done."""
    log, trained = StepLog(run.run_dir), StepLog(source).get("train")
    if log.get("train") is not None or trained is None:
        return
    controller = Controller.from_pretrained(source / CONTROLLER_NAME, run.model.made_for, device=run.model.device)
    kept = controller.rebased(run.full_p50_ms, run.estimator.fingerprint)
    folder = run.config.train_config.run_dir
    folder.mkdir(exist_ok=True)
    for name in (CHECKPOINT_NAME, METRICS_NAME, RUN_NAME):
        shutil.copyfile(load_run_config(source).train_config.run_dir / name, folder / name)
    kept.save_pretrained(run.run_dir / CONTROLLER_NAME)
    log.add("train", step_settings(run, "train"), 0.0, {**trained.facts, REBASED: sha256_file(source / _WEIGHTS)})
