"""Both stages' whole distributions and exact sums over them, which training only samples."""

from __future__ import annotations

from torch import Tensor

from pacevlm.training.grpo import entropy, kl_divergence, masked_log_softmax


def two_stage_log_probs(tier_logits: Tensor, stage2_logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both stages' log-probabilities under one mask over the whole knob space.

    A tier is allowed if any of its pairs is. The second factor of a tier that is not allowed has no meaning, and
    probability 0 in front of it; it is left unmasked so that it stays finite.

    Args:
        tier_logits: `(batch, tiers)`.
        stage2_logits: `(batch, tiers, pairs)`.
        mask: boolean `(batch, tiers, pairs)`, True where the configuration is allowed.

    Returns:
        `log π₁` of shape `(batch, tiers)` and `log π₂` of shape `(batch, tiers, pairs)`.
    """
    tier_mask = mask.any(dim=-1)
    log_pi1 = masked_log_softmax(tier_logits, tier_mask)
    return log_pi1, masked_log_softmax(stage2_logits, mask | ~tier_mask.unsqueeze(-1))


def joint_entropy(log_pi1: Tensor, log_pi2: Tensor) -> Tensor:
    """Exact entropy of the joint policy, H(π₁) + Σₜ π₁(t) H(π₂(· | t)).

    `(batch, tiers)` and `(batch, tiers, pairs)` give `(batch,)`.
    """
    return entropy(log_pi1) + (log_pi1.exp() * entropy(log_pi2)).sum(dim=-1)


def joint_kl(log_pi1: Tensor, log_pi2: Tensor, ref_log_pi1: Tensor, ref_log_pi2: Tensor) -> Tensor:
    """Exact KL of the joint policy from the reference; shapes as in `joint_entropy`."""
    second = kl_divergence(log_pi2, ref_log_pi2)
    return kl_divergence(log_pi1, ref_log_pi1) + (log_pi1.exp() * second).sum(dim=-1)
