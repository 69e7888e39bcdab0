"""Settings of one training run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pacevlm.errors import ConfigError
from pacevlm.training.constraint import ConstraintConfig
from pacevlm.training.grpo import GRPOConfig
from pacevlm.training.reward import RewardConfig
from pacevlm.types import BudgetKind

# What may differ between a run and its continuation: where it is stored and how it is watched, never what it computes.
_WATCHING = frozenset(
    {
        "run_dir",
        "checkpoint_every_steps",
        "checkpoint_every_seconds",
        "measure_every_steps",
        "num_measured",
        "tensorboard",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; rollouts per (example, budget) are `grpo.group_size`.

    Attributes:
        run_dir: folder that holds everything the run leaves behind.
        steps: batches of rollouts.
        batch_size: (example, budget) pairs per step.
        budgets_per_example: budgets that each drawn example gets in a step; they share its vision features.
        epochs_per_batch: updates of the controller per batch of rollouts.
        lr: learning rate of Adam.
        final_lr: what the learning rate falls to, linearly over the run; None keeps it.
        ema_decay: the controller that training gives is an exponential moving average of the weights with this decay
            per step (Polyak and Juditsky 1992); 0 gives the last weights. Rollouts always use the last ones.
        max_grad_norm: gradients are scaled down to this norm.
        min_budget: smallest budget, as a fraction of the trainer's reference latency. In a run that is the guardrail's
            bound on the full configuration, so that wide bounds leave as much to choose from as tight ones.
        max_budget: largest budget, as such a fraction.
        budget_scale: whether budgets are spread evenly over that range or over its logarithm.
        budget_kind: what a budget covers, the whole request (`e2e`) or the time to the first token (`ttft`).
        mask: keep knobs whose upper bound exceeds the budget from being sampled; without the mask only the
            multiplier keeps latency down.
        final_entropy_coef: what the entropy bonus falls to, linearly over the run, from `grpo.entropy_coef`; None
            keeps it.
        max_tightening: the guardrail's bounds are multiplied, for each (example, budget) anew, by a factor from 1 to
            this, spread evenly over its logarithm: bounds are calibrated again after training, on what the machine is
            like then, and a policy should know its way under other masks than the first ones.
        num_examples: only the first so many examples of the data set; None takes all.
        seed: all randomness derives from this number and the step.
        checkpoint_every_steps: most steps between two checkpoints.
        checkpoint_every_seconds: most seconds between two checkpoints; None leaves it to the steps.
        measure_every_steps: steps between two comparisons of predicted and measured latency, if the trainer is given
            a way to measure; 0 is never.
        num_measured: requests that each comparison measures.
        tensorboard: write TensorBoard events beside the JSON lines.

    Raises:
        ConfigError: a value is outside its range.
    """

    run_dir: Path
    steps: int = 300
    batch_size: int = 32
    budgets_per_example: int = 4
    epochs_per_batch: int = 2
    lr: float = 1e-3
    final_lr: float | None = None
    ema_decay: float = 0.0
    max_grad_norm: float = 1.0
    min_budget: float = 0.3
    max_budget: float = 1.1
    budget_scale: Literal["uniform", "log-uniform"] = "uniform"
    budget_kind: BudgetKind = "e2e"
    mask: bool = True
    max_tightening: float = 1.0
    final_entropy_coef: float | None = None
    num_examples: int | None = None
    seed: int = 0
    checkpoint_every_steps: int = 1
    checkpoint_every_seconds: float | None = None
    measure_every_steps: int = 0
    num_measured: int = 8
    tensorboard: bool = False
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        least = {
            "steps": 1,
            "batch_size": 1,
            "budgets_per_example": 1,
            "epochs_per_batch": 1,
            "num_examples": 1,
            "seed": 0,
            "checkpoint_every_steps": 1,
            "measure_every_steps": 0,
            "num_measured": 1,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name == "num_examples":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from {minimum}")
        if self.batch_size % self.budgets_per_example:
            raise ConfigError(
                f"batch_size {self.batch_size} counts (example, budget) pairs; make it a multiple of "
                f"budgets_per_example {self.budgets_per_example}"
            )
        for name in ("lr", "max_grad_norm", "min_budget", "max_budget"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name} is {value}; it must be a finite number above 0")
        if not math.isfinite(self.max_tightening) or self.max_tightening < 1:
            raise ConfigError(f"max_tightening is {self.max_tightening}; it must be a finite number from 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must lie from 0 to below 1, for example 0.98")
        if self.min_budget > self.max_budget:
            raise ConfigError(f"min_budget {self.min_budget} is above max_budget {self.max_budget}")
        if self.budget_scale not in ("uniform", "log-uniform"):
            raise ConfigError(f"budget_scale is {self.budget_scale!r}; use 'uniform' or 'log-uniform'")
        if self.budget_kind not in get_args(BudgetKind):
            raise ConfigError(f"budget_kind is {self.budget_kind!r}; use one of {get_args(BudgetKind)}")
        for name in ("final_lr", "final_entropy_coef", "checkpoint_every_seconds"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ConfigError(f"{name} is {value}; it must be a finite number from 0, or None")

    def entropy_coef(self, step: int) -> float:
        """Weight of the entropy bonus at a step, counted from 0."""
        return self._at(step, self.grpo.entropy_coef, self.final_entropy_coef)

    def learning_rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        return self._at(step, self.lr, self.final_lr)

    def _at(self, step: int, start: float, end: float | None) -> float:
        if end is None or self.steps == 1:
            return start
        return start + (end - start) * step / (self.steps - 1)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return {**asdict(self), "run_dir": os.fspath(self.run_dir)}

    def identity(self) -> dict[str, Any]:
        """The settings that a continuation must share: all that the results depend on."""
        return {name: value for name, value in self.to_dict().items() if name not in _WATCHING}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`, for example of `config` in `run.json`; raises ConfigError on unknown settings."""
        nested = {"grpo": GRPOConfig, "reward": RewardConfig, "constraint": ConstraintConfig}
        settings = dict(values)
        for name, kind in nested.items():
            if name in settings:
                _refuse_unknown(f"{name} settings", settings[name], kind)
                settings[name] = kind(**settings[name])
        _refuse_unknown("training settings", settings, cls)
        if "run_dir" not in settings:
            raise ConfigError("the training settings need run_dir, the folder of the run")
        return cls(**settings)


def _refuse_unknown(what: str, values: Any, kind: type[Any]) -> None:
    known = [entry.name for entry in fields(kind)]
    if not isinstance(values, Mapping):
        raise ConfigError(f"the {what} are {values!r}; they must be a mapping with keys among {known}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"the {what} {unknown} are unknown; allowed are {known}")
