"""The two stages of a decision: small networks from features to logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEAD_STD = 0.01
"""Standard deviation of the heads' initial weights: logits start near 0, and the policy near uniform over the mask."""

INITIAL_SHARPNESS, MAX_LOG_SHARPNESS = 5.0, 10.0
"""How many logits an accuracy of 1 is worth before training, and the logarithm of the most that it may be worth."""

# A mean of small token embeddings has a variance near PyTorch's default of 1e-5, which would not normalise it.
INPUT_NORM_EPS = 1e-10


class Stage1(nn.Module):
    """Scores the vision tiers of a request, before any pixel reaches the vision encoder.

    A logit is a learned score less what the tier's time costs, which is known, times a learned sharpness: how many
    logits an accuracy of 1 is worth. So what is learned of accuracies holds at every price.

    Args:
        num_scalars: leading features: objective, sizes and what else is a few numbers.
        num_thumbnail: features of the thumbnail behind them, 0 for none.
        d_model: the pooled question embedding behind them.
        num_tiers: tiers to choose from; what the time of each costs comes last.
        hidden_dim: width of all hidden layers.
    """

    def __init__(
        self, num_scalars: int, num_thumbnail: int, d_model: int, num_tiers: int, hidden_dim: int = 64
    ) -> None:
        super().__init__()
        self.split_sizes = (num_scalars, num_thumbnail, d_model, num_tiers)
        # One projection per kind of feature, added up: in one joint projection a wide question embedding would drown
        # the few numbers that say what the budget allows.
        self.scalars = nn.Linear(num_scalars, hidden_dim)
        self.question_norm = nn.LayerNorm(d_model, eps=INPUT_NORM_EPS)
        self.question = nn.Linear(d_model, hidden_dim, bias=False)
        self.thumbnail: nn.Module | None = None
        if num_thumbnail:
            self.thumbnail = nn.Sequential(
                nn.Linear(num_thumbnail, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim, bias=False)
            )
        self.hidden = nn.Sequential(nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU())
        self.head = _head(hidden_dim, num_tiers)
        self.sharpness = _sharpness(hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Tier logits `(batch, tiers)` of features `(batch, num_scalars + num_thumbnail + d_model + num_tiers)`."""
        scalars, thumbnail, question, costs = features.split(self.split_sizes, dim=-1)
        combined = self.scalars(scalars) + self.question(self.question_norm(question))
        if self.thumbnail is not None:
            combined = combined + self.thumbnail(thumbnail)
        hidden = self.hidden(combined)
        logits: Tensor = self.head(hidden) - _sharpness_of(self.sharpness(hidden)) * costs
        return logits


class Stage2(nn.Module):
    """Scores what stage 2 may choose for a request, every (top_k, num_blocks), after the first block.

    A logit is the sum of one head over top_k and one over num_blocks, plus a term of the pair itself: two heads alone
    cannot say that one knob should be high only where the other is low, which is what a joint mask often asks for. From
    it goes what the choice's time costs, as in stage 1.

    Args:
        d_model: width of the latency token's output.
        num_objective_features: features of the objective, budget and price.
        num_tiers: tiers of the knob space.
        num_top_ks: top_k values to choose from.
        num_num_blocks: num_blocks values to choose from.
        hidden_dim: width of all hidden layers.
        pairwise: whether the pair term exists.
    """

    def __init__(
        self,
        d_model: int,
        num_objective_features: int,
        num_tiers: int,
        num_top_ks: int,
        num_num_blocks: int,
        hidden_dim: int = 64,
        pairwise: bool = True,
    ) -> None:
        super().__init__()
        self.num_tiers = num_tiers
        self.output_norm = nn.LayerNorm(d_model, eps=INPUT_NORM_EPS)
        self.output = nn.Linear(d_model, hidden_dim, bias=False)
        self.scalars = nn.Linear(num_objective_features + num_tiers, hidden_dim)
        self.hidden = nn.Sequential(nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU())
        self.top_k_head = _head(hidden_dim, num_top_ks)
        self.num_blocks_head = _head(hidden_dim, num_num_blocks)
        self.pair_head = _head(hidden_dim, num_top_ks * num_num_blocks) if pairwise else None
        self.sharpness = _sharpness(hidden_dim)

    def forward(
        self, latency_token_outputs: Tensor, objective_features: Tensor, tier_indices: Tensor, costs: Tensor
    ) -> Tensor:
        """Logits `(batch, top_ks, num_blocks)`.

        Args:
            latency_token_outputs: the latency token behind the first block, `(batch, d_model)`.
            objective_features: `(batch, num_objective_features)`.
            tier_indices: the tier that stage 1 chose, `(batch,)` whole numbers.
            costs: what the time of each choice costs, in accuracy, `(batch, top_ks, num_blocks)`.
        """
        tiers = nn.functional.one_hot(tier_indices, self.num_tiers).to(objective_features)
        combined = self.output(self.output_norm(latency_token_outputs))
        combined = combined + self.scalars(torch.cat([objective_features, tiers], dim=-1))
        hidden = self.hidden(combined)
        logits: Tensor = self.top_k_head(hidden)[:, :, None] + self.num_blocks_head(hidden)[:, None, :]
        if self.pair_head is not None:
            logits = logits + self.pair_head(hidden).view_as(logits)
        return logits - _sharpness_of(self.sharpness(hidden)).unsqueeze(-1) * costs


def _head(hidden_dim: int, num_actions: int) -> nn.Linear:
    head = nn.Linear(hidden_dim, num_actions)
    nn.init.normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return head


def _sharpness(hidden_dim: int) -> nn.Linear:
    """Gives the logarithm of the sharpness."""
    head = _head(hidden_dim, 1)
    nn.init.constant_(head.bias, math.log(INITIAL_SHARPNESS))
    return head


def _sharpness_of(logarithm: Tensor) -> Tensor:
    return logarithm.clamp(max=MAX_LOG_SHARPNESS).exp()
