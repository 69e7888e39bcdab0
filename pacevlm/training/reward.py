"""What one rollout earns (reward, less the price of its time) and its cost (latency over budget), for the trainer.

The two are kept apart for the constrained update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pacevlm.errors import BudgetError, ConfigError, DataError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.training.train_config import RewardConfig


class RewardTerms(NamedTuple):
    """Reward, cost and violation indicator of every rollout, all of the accuracy's shape."""

    reward: Tensor
    cost: Tensor
    violation: Tensor


def relative_cost(knobs: Knobs, space: KnobSpace) -> float:
    """Size of a configuration relative to the full one, in (0, 1]: the mean over the knobs of value / largest value.

    A tier has no numeric value, so its rank (from 1) stands in. Raises KnobError if the knobs are not in the space.
    """
    space.index(knobs)  # refuses foreign knobs with a message that lists the allowed values
    tier = (space.tiers.index(knobs.tier) + 1) / len(space.tiers)
    return (tier + knobs.top_k / space.top_ks[-1] + knobs.num_blocks / space.num_blocks[-1]) / 3


def compute_reward(
    accuracy: Tensor,
    latency_ms: Tensor,
    budget_ms: Tensor,
    config: RewardConfig,
    *,
    prices: Tensor | None = None,
    full_ms: float = 1.0,
    knob_cost: Tensor | None = None,
) -> RewardTerms:
    """Reward and cost of rollouts.

    Args:
        accuracy: any shape, in [0, 1].
        latency_ms: latency of each rollout, milliseconds, of the same shape.
        budget_ms: milliseconds, broadcastable to that shape, for example `(batch, 1)` against `(batch, group)`.
        config: the weights of the optional terms.
        prices: points of accuracy per full latency, broadcastable as the budgets are; time costs nothing if None.
        full_ms: the full latency, milliseconds.
        knob_cost: `relative_cost` of each rollout's knobs; needed only with a complexity penalty.

    Raises:
        DataError: accuracy outside [0, 1], a latency that is negative or not finite, or shapes that do not fit.
        BudgetError: a budget is not a positive, finite number.
        ConfigError: a complexity penalty without `knob_cost`.
    """
    if latency_ms.shape != accuracy.shape:
        raise DataError(f"latency_ms has shape {tuple(latency_ms.shape)}, accuracy {tuple(accuracy.shape)}; give equal")
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise DataError("accuracy must lie in [0, 1] for every rollout; check the metric that scored the answers")
    if not bool((torch.isfinite(latency_ms) & (latency_ms >= 0)).all()):
        raise DataError("latency_ms must be finite and not negative for every rollout; check the estimator")
    if not bool((torch.isfinite(budget_ms) & (budget_ms > 0)).all()):
        raise BudgetError("budget_ms must be a positive, finite number of milliseconds for every rollout")
    try:
        budget_ms = budget_ms.expand(accuracy.shape)
    except RuntimeError:
        raise DataError(f"budget_ms {tuple(budget_ms.shape)} does not broadcast to {tuple(accuracy.shape)}") from None

    # A budget that is met to the millisecond is met: only more than the budget is a violation.
    violation = (latency_ms > budget_ms).to(accuracy.dtype)
    cost = violation if config.cost == "violation" else (latency_ms / budget_ms - 1).clamp(min=0).to(accuracy.dtype)
    reward = accuracy - config.violation_penalty * violation
    if config.complexity_penalty > 0:
        if knob_cost is None:
            raise ConfigError("complexity_penalty is set, so compute_reward needs knob_cost (see relative_cost)")
        if knob_cost.shape != accuracy.shape:
            raise DataError(f"knob_cost has shape {tuple(knob_cost.shape)}, accuracy {tuple(accuracy.shape)}")
        reward = reward - config.complexity_penalty * knob_cost
    if prices is not None:
        reward = reward - prices / 100 * (latency_ms / full_ms)
    return RewardTerms(reward.to(accuracy.dtype), cost, violation)
