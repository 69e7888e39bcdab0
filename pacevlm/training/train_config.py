"""Settings of one training run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pacevlm.checks import MAX_COUNT, MAX_SEED, check_path, check_real, check_whole
from pacevlm.config import MAX_FRACTION
from pacevlm.errors import ConfigError
from pacevlm.knobs import MAX_PRICE
from pacevlm.types import BudgetKind, check_budget_kind

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


MAX_BATCH, MAX_ROLLOUTS = 65536, 1 << 22
"""Most contexts, or rollouts of one, in a step, and most rollouts of all; their tensors must fit in memory."""
NUM_PRICES = 10
"""Prices above none that what was trained is calibrated and judged at."""
BLIND_TO = ("question", "latency_token")
"""What an ablation may keep from the controller."""
MAX_WEIGHT = 1e9
"""Largest weight, gain or penalty, far beyond what makes a difference."""


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of the loss.

    Attributes:
        group_size: rollouts per (example, budget).
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: the ratio is clipped from above at 1 + clip_high (larger than clip_low: DAPO, Yu et al. 2025, 3.1).
        beta: weight of the KL divergence from the reference policy.
        entropy_coef: weight of the entropy bonus.
        scale_rewards: what centred rewards are divided by: `none`, the standard deviation over the `batch`, or that
            of the rollout's own `group` (Shao et al. 2024, 4.1.1).
        scale_eps: added to a standard deviation before dividing by it.
        equal_within: rewards (and costs) of a group that spread no further than this count as all equal.
        baseline: what a reward is compared with: the other rewards of its `group`, or the mean over the `batch`, which
            is REINFORCE (Williams 1992) with the same clipping; equal groups then count as well.

    Raises:
        ConfigError: a value is outside its range.
    """

    group_size: int = 16
    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.0
    entropy_coef: float = 0.0
    scale_rewards: Literal["none", "batch", "group"] = "batch"
    scale_eps: float = 1e-4
    equal_within: float = 1e-6
    baseline: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        check_whole(self, 2, MAX_BATCH, "group_size")  # a rollout is compared with others
        check_real(self, 0, 1, "clip_low", above=True, below=True)
        check_real(self, 0, MAX_WEIGHT, "clip_high", above=True)
        check_real(self, 0, MAX_WEIGHT, "beta", "entropy_coef", "scale_eps", "equal_within")
        if self.scale_rewards not in ("none", "batch", "group"):
            raise ConfigError(f"scale_rewards is {self.scale_rewards!r}; use 'none', 'batch' or 'group'")
        if self.baseline not in ("group", "batch"):
            raise ConfigError(f"baseline is {self.baseline!r}; use 'group' or 'batch'")


@dataclass(frozen=True)
class RewardConfig:
    """Settings of the reward; with the defaults it is the accuracy, less what the time costs at the context's price.

    Attributes:
        cost: what the multiplier prices: `violation` (1 if latency exceeds the budget, else 0) or `overshoot`
            (`max(0, latency / budget - 1)`).
        violation_penalty: fixed amount taken off the reward of a rollout that exceeds its budget.
        complexity_penalty: amount taken off per unit of relative cost of the knobs.

    Raises:
        ConfigError: an unknown cost, or a weight that is negative or not finite.
    """

    cost: Literal["violation", "overshoot"] = "violation"
    violation_penalty: float = 0.0
    complexity_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.cost not in ("violation", "overshoot"):
            raise ConfigError(f"cost is {self.cost!r}; use 'violation' or 'overshoot'")
        check_real(self, 0, MAX_WEIGHT, "violation_penalty", "complexity_penalty")


@dataclass(frozen=True)
class ConstraintConfig:
    """Settings of the PID controller (Stooke et al. 2020, section 5).

    Attributes:
        target: violation rate (or mean cost) that is tolerated.
        k_p: gain of the present excess over the target.
        k_i: gain of the summed excess; the plain Lagrangian method is the controller with this gain only.
        k_d: gain of the rise since the last update; a falling rate is not rewarded.
        integral_max: upper limit of the summed excess, so that a long bad start does not price violations for ever.
        smoothing: decay in [0, 1) of an exponential average over the measured rate, for the P and D terms; 0 is off.

    Raises:
        ConfigError: a value is outside its range.
    """

    target: float = 0.01
    k_p: float = 1.0
    k_i: float = 0.1
    k_d: float = 0.0
    integral_max: float = 50.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_real(self, 0, MAX_WEIGHT, "target", "k_p", "k_i", "k_d")
        check_real(self, 0, MAX_WEIGHT, "integral_max", above=True)
        check_real(self, 0, 1, "smoothing", below=True)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; rollouts per (example, budget) are `grpo.group_size`.

    Attributes:
        run_dir: folder that holds everything the run leaves behind.
        steps: batches of rollouts.
        batch_size: contexts (example, budget) per step.
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
        max_price: largest price of time, in points of accuracy per full latency. A share of the contexts has no price,
            the others one spread evenly over the logarithm from `min_price` to this, so that one controller learns all
            of them. 0 trains without prices.
        min_price: smallest price above none.
        unpriced_share: share of the contexts whose time costs nothing.
        blind_to: what the controller does not get to see, for ablations: the `question` in stage 1, the
            `latency_token`'s output in stage 2.
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
    max_price: float = 0.0
    min_price: float = 1.0
    unpriced_share: float = 0.25
    final_entropy_coef: float | None = None
    blind_to: tuple[str, ...] = ()
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
        check_path("run_dir", self.run_dir)
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        check_whole(self, 1, MAX_COUNT, "steps", "checkpoint_every_steps", "num_measured")
        check_whole(self, 1, MAX_BATCH, "batch_size", "budgets_per_example")
        check_whole(self, 1, 1000, "epochs_per_batch")
        check_whole(self, 1, MAX_COUNT, "num_examples", optional=True)
        check_whole(self, 0, MAX_COUNT, "measure_every_steps")
        check_whole(self, 0, MAX_SEED, "seed")
        if self.batch_size * self.grpo.group_size > MAX_ROLLOUTS:
            raise ConfigError(
                f"batch_size {self.batch_size} times grpo.group_size {self.grpo.group_size} are more than the "
                f"{MAX_ROLLOUTS} rollouts that a step may have; make one of them smaller"
            )
        if self.batch_size % self.budgets_per_example:
            raise ConfigError(
                f"batch_size {self.batch_size} counts contexts (example, budget); make it a multiple of "
                f"budgets_per_example {self.budgets_per_example}"
            )
        check_real(self, 0, 10, "lr", above=True)
        check_real(self, 0, 10, "final_lr", optional=True)
        check_real(self, 0, MAX_WEIGHT, "max_grad_norm", above=True)
        check_real(self, 0, MAX_FRACTION, "min_budget", "max_budget", above=True)
        check_real(self, 1, MAX_FRACTION, "max_tightening")
        check_real(self, 0, 1, "ema_decay", below=True)
        check_real(self, 0, 1, "unpriced_share")
        check_real(self, 0, MAX_PRICE, "max_price")
        check_real(self, 0, MAX_PRICE, "min_price", above=True)
        if 0 < self.max_price < self.min_price:
            raise ConfigError(f"min_price {self.min_price} is above max_price {self.max_price}")
        check_real(self, 0, MAX_WEIGHT, "final_entropy_coef", "checkpoint_every_seconds", optional=True)
        if self.min_budget > self.max_budget:
            raise ConfigError(f"min_budget {self.min_budget} is above max_budget {self.max_budget}")
        if self.budget_scale not in ("uniform", "log-uniform"):
            raise ConfigError(f"budget_scale is {self.budget_scale!r}; use 'uniform' or 'log-uniform'")
        check_budget_kind(self.budget_kind)
        object.__setattr__(self, "blind_to", tuple(self.blind_to))
        if not set(self.blind_to) <= set(BLIND_TO):
            raise ConfigError(f"blind_to is {list(self.blind_to)}; use some of {', '.join(BLIND_TO)}")

    @property
    def prices(self) -> tuple[float, ...]:
        """Prices that what was trained is calibrated and judged at: none, and some from `min_price` to `max_price`."""
        if not self.max_price:
            return (0.0,)
        steps = NUM_PRICES - 1 if self.max_price > self.min_price else 0
        growth = (self.max_price / self.min_price) ** (1 / max(steps, 1))
        # To three digits, so that a price can be read, and given on a command line.
        return (0.0, *(float(f"{self.min_price * growth**i:.3g}") for i in range(steps + 1)))

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
        values = {name: value for name, value in self.to_dict().items() if name not in _WATCHING}
        # Runs from before these settings existed had what is their default, and go on.
        if not self.blind_to:
            del values["blind_to"]
        if self.grpo.baseline == "group":
            del values["grpo"]["baseline"]
        return values

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
