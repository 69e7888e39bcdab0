"""What a run directory holds, by name: what each step leaves, what is missing, and how to clear it."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path

from pacevlm.errors import ConfigError, StorageError
from pacevlm.evaluation import sweep
from pacevlm.pipeline.lock import LOCK_NAME
from pacevlm.pipeline.outputs import DRAWN_NAMES, HEADROOM_NAME, RECORDS_NAME, RESULTS_NAME, SHOWN_NAME
from pacevlm.pipeline.run_config import CONFIG_NAME, RunConfig, is_run_config
from pacevlm.pipeline.step_log import STEP_LOG_NAME
from pacevlm.training.trainer import CHECKPOINT_NAME, METRICS_NAME, RUN_NAME, TENSORBOARD_NAME

OUTCOMES_NAME = "outcomes.sqlite"
PROFILE_NAME, ESTIMATOR_NAME, OUTPUT_LENGTH_NAME = "profile.json", "estimator.json", "output_length.json"
# The guardrail as profiled, which training uses, and as calibrated again on what the controller picks.
PROFILE_GUARDRAIL_NAME, GUARDRAIL_NAME = "guardrail_profile.json", "guardrail.json"
PRICES_NAME = "prices.json"
CONTROLLER_NAME, BUNDLE_FOLDER = "controller", "bundle"
LOOKUP_NAME, FIXED_NAME, PREDICTOR_NAME = "lookup_table.json", "fixed.json", "predictor.json"
# What an unfinished step has measured so far; it goes once the step is finished.
PARTIAL_NAMES = {
    "profile": (f"{PROFILE_NAME}.partial.jsonl",),
    "lookup": (),
    "train": (),
    "calibrate": ("calibrate.partial.jsonl",),
    "evaluate": sweep.PARTIAL_NAMES,
}
_CONTROLLER_FILES = (f"{CONTROLLER_NAME}/controller.json", f"{CONTROLLER_NAME}/controller.safetensors")
_BUNDLE_FILES = ("bundle.json", ESTIMATOR_NAME, GUARDRAIL_NAME, OUTPUT_LENGTH_NAME, PRICES_NAME, *_CONTROLLER_FILES)
_TRAIN_FILES = (CHECKPOINT_NAME, METRICS_NAME, RUN_NAME)


def source_files(config: RunConfig, step: str) -> tuple[str, ...]:
    """What a step learned or measured: from these files alone all its others can be made again."""
    train = config.train.run_dir.name
    return {
        "profile": (PROFILE_NAME,),
        "lookup": (),
        "train": (f"{train}/{CHECKPOINT_NAME}", f"{train}/{METRICS_NAME}"),
        "calibrate": (GUARDRAIL_NAME, PRICES_NAME, PREDICTOR_NAME),
        "evaluate": (RECORDS_NAME, RESULTS_NAME, SHOWN_NAME, LOOKUP_NAME, FIXED_NAME),
    }[step]


def made_files(config: RunConfig, step: str) -> tuple[str, ...]:
    """What a step makes of its source files."""
    answering = (PREDICTOR_NAME,) if config.calibrate.policy == "predictor" else ()
    return {
        "profile": (ESTIMATOR_NAME, PROFILE_GUARDRAIL_NAME, OUTPUT_LENGTH_NAME),
        "lookup": (OUTCOMES_NAME,),
        "train": (f"{config.train.run_dir.name}/{RUN_NAME}", *_CONTROLLER_FILES),
        "calibrate": tuple(f"{BUNDLE_FOLDER}/{name}" for name in (*_BUNDLE_FILES, *answering)),
        "evaluate": DRAWN_NAMES,
    }[step]


def missing_files(run_dir: Path, names: tuple[str, ...]) -> list[str]:
    """Those of the names that are no file of the run directory."""
    return [name for name in names if not (run_dir / name).is_file()]


def check_directory(config: RunConfig, *, fresh: bool) -> None:
    """Refuse a directory that cannot be written, or that holds files but is no run's.

    A run's is known by the mark that its writer left, by its settings, or by any file that only a run has, so that one
    that was deleted half-way still counts.

    Raises:
        ConfigError: it, or what holds it, is no folder or may not be written to; its `config.json` is something else's;
            or, to start over, nothing there is a run's.
    """
    run_dir, path = config.run_dir, config.run_dir / CONFIG_NAME
    existing = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir is {str(run_dir)!r}, but {str(existing)!r} is no folder; give another run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir is {str(run_dir)!r}, but {str(existing)!r} may not be written to; give another")
    settings = _read_settings(path)
    if settings is not None and not is_run_config(settings):
        raise ConfigError(
            f"{run_dir} holds the {CONFIG_NAME} of something else, such as a model; nothing was removed: give another "
            "run directory"
        )
    if not fresh or not run_dir.exists() or not any(run_dir.iterdir()):
        return
    # Names that other programs use as well say nothing.
    telling = [name for name in _file_names(config) if name not in (CONFIG_NAME, RECORDS_NAME, RESULTS_NAME)]
    telling = [name for name in telling if name not in DRAWN_NAMES]
    is_run = (
        settings is not None
        or (run_dir / LOCK_NAME).is_file()
        or len(missing_files(run_dir, (*telling,))) < len(telling)
    )
    if not is_run:
        raise ConfigError(
            f"{run_dir} holds files, but none that tells that it is a run's directory; nothing was removed: give "
            "another run directory"
        )


def remove_artefacts(config: RunConfig) -> None:
    """Delete what the steps of a run wrote into its directory, and nothing else there; only its lock stays.

    Stopped half-way, it can be done again: what says that steps are finished goes first, what says that this is a
    run's directory goes last.

    Raises:
        StorageError: a file could not be removed.
    """
    run_dir, train = config.run_dir, config.run_dir / config.train.run_dir
    remove_training(train)
    for name in _file_names(config):
        remove_file(run_dir / name)
    remove_leftovers(config)
    for folder in (
        run_dir / BUNDLE_FOLDER / CONTROLLER_NAME,
        run_dir / BUNDLE_FOLDER,
        run_dir / CONTROLLER_NAME,
        train,
    ):
        with suppress(OSError):  # it is not there, or holds something that is not the run's
            folder.rmdir()


def remove_training(folder: Path) -> None:
    """Delete what a training run left in its folder, the checkpoint last; raises StorageError."""
    for path in sorted((folder / TENSORBOARD_NAME).glob("events.out.tfevents.*")):
        remove_file(path)
    with suppress(OSError):
        (folder / TENSORBOARD_NAME).rmdir()
    for name in reversed(_TRAIN_FILES):
        remove_file(folder / name)


def remove_leftovers(config: RunConfig) -> None:
    """Delete the temporary files that a killed writer left; raises StorageError."""
    for name in _file_names(config):
        path = config.run_dir / name
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            remove_file(leftover)


def _file_names(config: RunConfig) -> tuple[str, ...]:
    """All that a run writes, the list of finished steps first and its settings last."""
    train = config.train.run_dir.name
    steps = [
        name
        for step in ("evaluate", "calibrate", "train", "lookup", "profile")
        for name in (*made_files(config, step), *source_files(config, step))
    ]
    return (
        *(STEP_LOG_NAME, *itertools.chain(*PARTIAL_NAMES.values()), HEADROOM_NAME, *steps),
        f"{OUTCOMES_NAME}-journal",  # of a killed writer; behind the store, which would be damaged without it
        *(f"{train}/{name}" for name in _TRAIN_FILES),
        CONFIG_NAME,
    )


def _read_settings(path: Path) -> object:
    """The content of a file of settings; None if there is none, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def remove_file(path: Path) -> None:
    """Delete a file that need not be there; raises StorageError."""
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except OSError as error:
        raise StorageError(f"{path} could not be removed: {error.strerror or error}") from error
