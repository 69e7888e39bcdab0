"""Group-relative policy optimisation over two-stage knob decisions, as pure functions of tensors.

Shapes: `batch` counts groups, that is contexts (example, budget); `group` counts the rollouts of each; `tiers` are the
actions of stage 1 and `computes` those of stage 2, in the order of `KnobSpace.compute`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pacevlm.errors import ConfigError, DataError, KnobError
from pacevlm.training.train_config import GRPOConfig

# Distributions -------------------------------------------------------------------------------------------------------


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities over the last axis in which masked actions have probability exactly 0.

    Args:
        logits: `(..., actions)`; what stands at masked actions is ignored and gets no gradient.
        mask: boolean, broadcastable to `logits`; True where an action is allowed.

    Returns:
        `(..., actions)`, -inf at masked actions, at least single precision.

    Raises:
        DataError: the mask is not boolean, or the shapes do not fit.
        KnobError: a row has no allowed action.
    """
    if mask.dtype != torch.bool:
        raise DataError(f"mask has dtype {mask.dtype}; give a boolean tensor, True where an action is allowed")
    try:
        mask = mask.expand(logits.shape)
    except RuntimeError:
        raise DataError(f"mask {tuple(mask.shape)} does not broadcast to logits {tuple(logits.shape)}") from None
    blocked = int((~mask.any(dim=-1)).sum())
    if blocked:
        raise KnobError(f"{blocked} rows of the mask allow no action; let the cheapest knobs through where none fit")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def sample_actions(log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One action per row of `(..., actions)`, drawn by the Gumbel-max trick; an action at -inf is never drawn."""
    noise = torch.empty_like(log_probs).exponential_(generator=generator)
    tiny = torch.finfo(log_probs.dtype).tiny
    gumbel = -noise.clamp(min=tiny).log()
    return (log_probs + gumbel).argmax(dim=-1)


def joint_log_prob(log_pi1: Tensor, tier: Tensor, log_pi2: Tensor, compute: Tensor) -> Tensor:
    """Log-probability of sampled configurations: log π₁(tier) + log π₂(compute | tier).

    Args:
        log_pi1: `(..., tiers)`.
        tier: sampled tier indices `(...)`.
        log_pi2: `(..., computes)`, of the sampled tier.
        compute: sampled stage-2 indices `(...)`.

    Returns:
        `(...)`.
    """
    first = log_pi1.gather(-1, tier.unsqueeze(-1)).squeeze(-1)
    return first + log_pi2.gather(-1, compute.unsqueeze(-1)).squeeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Exact entropy in nats over the last axis; actions at -inf add nothing and get no gradient."""
    return -(log_probs.exp() * log_probs.masked_fill(torch.isneginf(log_probs), 0.0)).sum(dim=-1)


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Exact KL(π ‖ π_ref) in nats over the last axis.

    Raises DataError if the reference rules out an action that the policy allows: they were masked differently.
    """
    absent = torch.isneginf(log_probs)
    if bool((torch.isneginf(ref_log_probs) & ~absent).any()):
        raise DataError("the reference policy rules out an allowed action; mask both policies alike")
    difference = log_probs.masked_fill(absent, 0.0) - ref_log_probs.masked_fill(absent, 0.0)
    return (log_probs.exp() * difference).sum(dim=-1)


def sampled_entropy(log_pi1: Tensor, log_pi2: Tensor, tier_ratio: Tensor | None = None) -> Tensor:
    """Estimate of the joint entropy when stage 2 is known for the sampled tiers only.

    Each stage's entropy is exact over its own actions; only the average over tiers is estimated, by the rollouts.
    The estimate is unbiased if `tier_ratio` is given, and so is its gradient: without the ratio the gradient misses
    how stage 1 could move towards tiers in which stage 2 is more (or less) certain.

    Args:
        log_pi1: `(batch, tiers)`.
        log_pi2: `(batch, group, computes)`, each rollout's own sampled tier.
        tier_ratio: `(batch, group)`, π₁(tier) now over π₁(tier) when the rollout was sampled; None counts as 1, which
            keeps the value unbiased on the first pass.

    Returns:
        `(batch, group)`; its mean over the group estimates the entropy of the joint policy.
    """
    second = entropy(log_pi2)
    return entropy(log_pi1).unsqueeze(-1) + (second if tier_ratio is None else tier_ratio * second)


def sampled_kl(
    log_pi1: Tensor, log_pi2: Tensor, ref_log_pi1: Tensor, ref_log_pi2: Tensor, tier_ratio: Tensor | None = None
) -> Tensor:
    """Estimate of the joint KL when stage 2 is known for the sampled tiers only; as `sampled_entropy`."""
    second = kl_divergence(log_pi2, ref_log_pi2)
    return kl_divergence(log_pi1, ref_log_pi1).unsqueeze(-1) + (second if tier_ratio is None else tier_ratio * second)


# Advantages ----------------------------------------------------------------------------------------------------------


class Advantages(NamedTuple):
    """Advantage of every rollout `(batch, group)`, and which groups carry a signal `(batch,)`, boolean."""

    advantages: Tensor
    keep: Tensor


def leave_one_out(values: Tensor) -> Tensor:
    """Each value minus the mean of the *other* values of its group; `(batch, group)` gives `(batch, group)`.

    The baseline does not depend on the rollout it is taken from, so the policy gradient stays unbiased (Kool et al.
    2019, "Buy 4 REINFORCE samples, get a baseline for free!"). Equals group / (group - 1) times value minus mean.
    """
    group = values.shape[-1]
    return (values - values.mean(dim=-1, keepdim=True)) * (group / (group - 1))


def group_advantages(
    rewards: Tensor, config: GRPOConfig, *, costs: Tensor | None = None, multiplier: float = 0.0
) -> Advantages:
    """Advantages of rewards, minus the multiplier times those of costs, centred separately.

    Only rewards are scaled. Were the multiplier inside the standardised value, a growing multiplier would shrink
    what accuracy weighs; this way it sets the price of a cost in units of the scaled accuracy advantage.

    Args:
        rewards: `(batch, group)`, group as in the settings.
        config: `baseline`, `scale_rewards` and its tolerances.
        costs: `(batch, group)`; None counts as no cost.
        multiplier: λ ≥ 0.

    Returns:
        The advantages, 0 in groups that are not kept, and the groups to keep: those in which rewards or costs differ,
        or all if the baseline is the batch's.

    Raises:
        DataError: shapes that do not fit, a value that is not finite, or a negative multiplier.
    """
    if rewards.dim() != 2 or rewards.shape[0] == 0 or rewards.shape[1] != config.group_size:
        raise DataError(f"rewards have shape {tuple(rewards.shape)}; expected (batch, {config.group_size})")
    if costs is not None and costs.shape != rewards.shape:
        raise DataError(f"costs have shape {tuple(costs.shape)}, rewards {tuple(rewards.shape)}; they must be equal")
    if not bool(torch.isfinite(rewards).all()) or (costs is not None and not bool(torch.isfinite(costs).all())):
        raise DataError("rewards and costs must be finite for every rollout")
    if not math.isfinite(multiplier) or multiplier < 0:
        raise DataError(f"multiplier is {multiplier}; it must be a finite number from 0")

    differs, centred = _differs(rewards, config), _centred(rewards, config)
    if config.scale_rewards == "batch":
        centred = centred / (centred.std() + config.scale_eps)
    elif config.scale_rewards == "group":
        centred = centred / (rewards.std(dim=-1, keepdim=True) + config.scale_eps)
    # Equal rewards leave rounding noise behind, which a division by a tiny deviation would turn into a signal.
    advantages = torch.where(differs.unsqueeze(-1), centred, 0.0)
    keep = differs
    if costs is not None:
        costs_differ = _differs(costs, config)
        advantages = advantages - multiplier * torch.where(costs_differ.unsqueeze(-1), _centred(costs, config), 0.0)
        keep = differs | costs_differ
    return Advantages(advantages, keep)


def _centred(values: Tensor, config: GRPOConfig) -> Tensor:
    return leave_one_out(values) if config.baseline == "group" else values - values.mean()


def _differs(values: Tensor, config: GRPOConfig) -> Tensor:
    """Groups that carry a signal, `(batch,)`."""
    if config.baseline == "batch":
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    return _spread(values) > config.equal_within


def _spread(values: Tensor) -> Tensor:
    return values.amax(dim=-1) - values.amin(dim=-1)


# Loss ----------------------------------------------------------------------------------------------------------------


def grpo_loss(
    logp_new: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    keep: Tensor,
    config: GRPOConfig,
    *,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    rewards: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate loss of a batch of groups, and its metrics under TRL's names.

    The surrogate is a sum over the rollouts of the groups that are kept, divided by the number of *all* rollouts. A
    count of kept rollouts would vary with what was sampled, and its division would bias the gradient.

    Args:
        logp_new: joint log-probabilities under the policy being trained, `(batch, group)`.
        logp_old: those under the policy that sampled, with the same masks, `(batch, group)`.
        advantages: `(batch, group)`.
        keep: boolean `(batch,)`; a group at False adds no surrogate, only KL and entropy.
        config: clipping and weights.
        entropy: `(batch,)` or `(batch, group)`; needed only with an entropy bonus, else for the metric.
        kl: `(batch,)` or `(batch, group)`; needed only with beta above 0, else for the metric.
        rewards: `(batch, group)`, for the metrics `reward` and `reward_std`.

    Returns:
        The scalar loss and the metrics; means over all rollouts.

    Raises:
        DataError: shapes that do not fit, or a rollout that the sampling policy could not have drawn.
        ConfigError: an entropy bonus without `entropy`, or beta without `kl`.
    """
    shape = logp_new.shape
    if logp_new.dim() != 2 or logp_new.numel() == 0:
        raise DataError(f"logp_new has shape {tuple(shape)}; expected (batch, group)")
    for name, value in (("logp_old", logp_old), ("advantages", advantages), ("rewards", rewards)):
        if value is not None and value.shape != shape:
            raise DataError(f"{name} has shape {tuple(value.shape)}, logp_new {tuple(shape)}; they must be equal")
    if keep.shape != shape[:1] or keep.dtype != torch.bool:
        raise DataError(f"keep is {keep.dtype} {tuple(keep.shape)}; expected boolean {tuple(shape[:1])}")
    if not bool(torch.isfinite(logp_old).all()):
        raise DataError(
            "logp_old is not finite: a masked action was sampled, or the rollout's mask was not the stored one"
        )
    if config.entropy_coef > 0 and entropy is None:
        raise ConfigError("entropy_coef is above 0, so grpo_loss needs entropy")
    if config.beta > 0 and kl is None:
        raise ConfigError("beta is above 0, so grpo_loss needs kl")
    entropy = None if entropy is None else _per_rollout("entropy", entropy, shape)
    kl = None if kl is None else _per_rollout("kl", kl, shape)

    ratio = (logp_new - logp_old.detach()).exp()
    advantages = advantages.detach()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    terms = torch.where(keep.unsqueeze(-1), -torch.minimum(ratio * advantages, clipped * advantages), 0.0)
    # The regularisers hold for every group: a policy that has become certain everywhere has only groups with equal
    # rewards, and without them nothing would ever move it again.
    if kl is not None and config.beta > 0:
        terms = terms + config.beta * kl
    if entropy is not None and config.entropy_coef > 0:
        terms = terms - config.entropy_coef * entropy
    loss = terms.mean()

    with torch.no_grad():
        low = (ratio < 1 - config.clip_low) & (advantages < 0)
        high = (ratio > 1 + config.clip_high) & (advantages > 0)
        metrics = {
            "clip_ratio/low_mean": low.float().mean().item(),
            "clip_ratio/high_mean": high.float().mean().item(),
            "clip_ratio/region_mean": (low | high).float().mean().item(),
            "frac_reward_zero_std": (~keep).float().mean().item(),
        }
        if entropy is not None:
            metrics["entropy"] = entropy.mean().item()
        if kl is not None:
            metrics["kl"] = kl.mean().item()
        if rewards is not None:
            metrics["reward"] = rewards.mean().item()
            metrics["reward_std"] = rewards.std().item()
    return loss, metrics


def _per_rollout(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape[:1]:
        return value.unsqueeze(-1).expand(shape)
    if value.shape == shape:
        return value
    raise DataError(f"{name} has shape {tuple(value.shape)}; expected {tuple(shape[:1])} or {tuple(shape)}")
