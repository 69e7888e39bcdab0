"""Settings of a whole run: thorough by default, and a set that is quick enough for a first look."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacevlm.checks import check_path
from pacevlm.config import (
    WITHIN_PACKAGE,
    CalibrateConfig,
    ControllerSettings,
    DataConfig,
    EvaluateConfig,
    LookupConfig,
    ModelConfig,
    PictureConfig,
    ProfileConfig,
    config_from_dict,
    config_to_dict,
)
from pacevlm.config_file import ConfigFile, read_config_file
from pacevlm.dataset_list import with_paths
from pacevlm.errors import ConfigError
from pacevlm.files import find_portable, portable_path, read_json, write_json_atomic
from pacevlm.training.train_config import GRPOConfig, TrainConfig

DEFAULT_RUN_DIR = Path("runs/default")
CONFIG_NAME = "config.json"
# Settings that name files or folders.
_PATHS = (
    ("model", "path"),
    ("data", "dataset"),
    ("data", "val_dataset"),
    ("data", "test_dataset"),
    ("profile", "source"),
)
# Where files beside the run directory were when it was written, for a run directory that moves without them.
_ABSOLUTE = "absolute_paths"


def train_defaults(steps: int, batch_size: int = 256) -> TrainConfig:
    """Training settings of a run.

    Few steps of large batches, a lasting entropy bonus and averaged weights: the frozen model remembers what it
    answered, so rollouts soon cost nothing, and what limits a controller is that it learns single answers by heart.
    A policy that stays uncertain ranks all configurations by what they gain, rather than the first good one alone.
    With twice the learning rate and less bonus it collapses onto single configurations under some profiles' masks.
    Bounds are up to 1.4 times the profile's: on a machine that is busier than profiled a controller meets such masks.
    At the highest price a tenth of the full latency is worth 13 points, and hardly a question is worth the full knobs.
    """
    return TrainConfig(
        run_dir=Path("train"),
        steps=steps,
        batch_size=batch_size,
        epochs_per_batch=1,
        lr=5e-4,
        ema_decay=0.98,
        min_budget=0.4,
        max_budget=1.2,
        max_tightening=1.4,
        max_price=128.0,
        grpo=GRPOConfig(group_size=64, entropy_coef=0.1),
    )


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run: model, data, and each step from profiling to evaluation.

    The defaults are thorough: about an hour on two CPU cores with the embedded model.

    Attributes:
        run_dir: folder that holds everything the run leaves behind.
        model: which model runs, and which configurations of it.
        data: which questions the controller learns from and is judged on.
        picture: how pictures are read.
        profile: how latencies are measured and bounded.
        lookup: the exhaustive sweep that the lookup table is fitted on.
        controller: how the controller is built.
        train: how the controller is trained; its `run_dir` is the name of a folder inside the run's.
        calibrate: the guardrail's second calibration, on the knobs that the controller picks.
        evaluate: how policies are compared on the test examples.

    Raises:
        ConfigError: `train.run_dir` is no plain name.
    """

    run_dir: Path = DEFAULT_RUN_DIR
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    picture: PictureConfig = field(default_factory=PictureConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    train: TrainConfig = field(default_factory=lambda: train_defaults(steps=800))
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        check_path("run_dir", self.run_dir)
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        name = self.train.run_dir
        # It is deleted when a run starts over, so it must not be able to name anything else.
        if len(name.parts) != 1 or name.name in ("", "..") or name.is_absolute():
            raise ConfigError(f"train.run_dir is {str(name)!r}; it must be the name of a folder inside run_dir")

    @property
    def train_config(self) -> TrainConfig:
        """The training settings with the folder resolved."""
        return dataclasses.replace(self.train, run_dir=self.run_dir / self.train.run_dir)


def quickstart_config(run_dir: Path = Path("runs/quickstart")) -> RunConfig:
    """The quick defaults, some nine minutes on two CPU cores with the embedded model.

    Every number that decides how long a quickstart takes stands here.
    """
    return RunConfig(
        run_dir=run_dir,
        data=DataConfig(num_train=500, num_val=200, num_test=600),
        profile=ProfileConfig(num_samples=250, repeats=1, num_lengths=400),
        lookup=LookupConfig(num_examples=500),
        train=train_defaults(steps=200, batch_size=128),
        calibrate=CalibrateConfig(num_requests=200),
        evaluate=EvaluateConfig(num_timed=40),
    )


def read_run_file(path: str | os.PathLike[str]) -> ConfigFile:
    """A TOML file of a run's settings; raises ConfigError as `read_config_file` does."""
    return read_config_file(path, (("run_dir",), *_PATHS))


# In the run directory ------------------------------------------------------------------------------------------------


def save_run_config(config: RunConfig) -> None:
    """Write the settings into the run directory, so that it can be moved or copied; raises StorageError.

    The directory itself is not named. Files inside it or beside it are named relative to it, all others absolutely.
    """
    values = config_to_dict(config)
    del values["run_dir"]
    absolute_paths: dict[str, str] = {}

    def portable(path: str) -> str:
        stored, absolute = portable_path(path, config.run_dir, config.run_dir)
        if absolute is not None:
            absolute_paths[stored] = absolute
        return stored

    for part, name in _PATHS:
        path = values[part][name]
        if path is None or path in WITHIN_PACKAGE:
            continue
        values[part][name] = with_paths(path, portable) if name == "dataset" else portable(path)
    write_json_atomic(config.run_dir / CONFIG_NAME, {**values, _ABSOLUTE: absolute_paths})


def load_run_config(run_dir: Path) -> RunConfig:
    """The settings that a run directory holds, wherever it lies now.

    Raises:
        ConfigError: the file is missing, damaged or no run's, or a setting is unknown or outside its range.
    """
    path = run_dir / CONFIG_NAME
    values = read_json(path, "settings of a run", ConfigError)
    if not is_run_config(values):
        raise ConfigError(f"{path} holds no settings of a run; give another run directory")
    absolute_paths = values.pop(_ABSOLUTE, {})
    if not isinstance(absolute_paths, dict):
        raise ConfigError(f"{path}: {_ABSOLUTE} is {absolute_paths!r}, no mapping; start over with --fresh")

    def find(stored: str) -> str:
        return find_portable(stored, absolute_paths.get(stored), run_dir)

    try:
        for part, name in _PATHS:
            stored = values[part].get(name)
            if isinstance(stored, str) and stored not in WITHIN_PACKAGE:
                values[part][name] = with_paths(stored, find) if name == "dataset" else find(stored)
        return config_from_dict(RunConfig, {**values, "run_dir": os.fspath(run_dir)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; start over with --fresh") from error


def is_run_config(values: Any) -> bool:
    """Whether the content of a `config.json` is a run's and not, say, a model's."""
    return isinstance(values, dict) and all(isinstance(values.get(name), dict) for name in ("model", "data", "profile"))
