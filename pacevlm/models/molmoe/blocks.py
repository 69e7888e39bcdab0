"""MolmoE's decoder blocks: attention with normalised queries and keys, and the mixture of experts."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from pacevlm.models.experts import route, run_experts, spread_top_k
from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig

Rope = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with float32 statistics; the weight multiplies after the cast back."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


class MolmoERMSNorm(nn.Module):
    """See `rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        return rms_norm(x, self.weight, self.eps)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> Rope:
    """Cosines and sines of the half-split rotation (Su et al. 2021), float32, each `(batch, 1, tokens, head_dim)`.

    The sines of the first half are negative: they multiply the second half of what is rotated.
    """
    angles = position_ids[:, None, :, None].float() * _rope_frequencies(head_dim, theta, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@functools.lru_cache(maxsize=16)
def _rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # Kept for later calls, which may be of any mode.
    with torch.inference_mode(False):
        powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / theta**powers


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate heads `(batch, heads, tokens, head_dim)` by their positions, in float32."""
    cos, sin = rope
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(wide.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class MolmoEAttention(nn.Module):
    """Self-attention with its pre-norm; queries and keys are normalised over all heads at once."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.n_heads, config.num_key_value_heads
        self.head_dim = config.head_dim_
        kv_width = self.num_kv_heads * self.head_dim
        self.splits = [config.d_model, kv_width, kv_width]
        self.attn_norm = MolmoERMSNorm(config.d_model, config.layer_norm_eps)
        self.att_proj = nn.Linear(config.d_model, sum(self.splits), bias=False)
        self.q_norm = MolmoERMSNorm(config.d_model, config.layer_norm_eps)
        self.k_norm = MolmoERMSNorm(kv_width, config.layer_norm_eps)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries, keys and values, each `(batch, heads, tokens, head_dim)`."""
        q, k, v = self.att_proj(self.attn_norm(x)).split(self.splits, dim=-1)
        q, k = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        return rotate(q, rope), rotate(k, rope), self._heads(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """Mix values and project out; `mask` is True where a query may look, `(batch, 1, queries, keys)`.

        Returns:
            `(batch, queries, d_model)`, to be added to the residual stream.
        """
        gqa = self.num_kv_heads != self.num_heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
        out: Tensor = self.attn_out(mixed.transpose(1, 2).flatten(2))
        return out


class MolmoEExperts(nn.Module):
    """All experts of a block in two fused tensors."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(config.moe_num_experts, 2 * config.expert_dim, config.d_model))
        self.down_proj = nn.Parameter(torch.zeros(config.moe_num_experts, config.d_model, config.expert_dim))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `run_experts`."""
        return run_experts(x, weights, experts, self.gate_up_proj, self.down_proj, keep)


class MolmoEMoE(nn.Module):
    """Mixture of experts with its pre-norm; `top_k` may differ from row to row."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.top_k = config.moe_top_k
        self.ff_norm = MolmoERMSNorm(config.d_model, config.layer_norm_eps)
        self.gate = nn.Linear(config.d_model, config.moe_num_experts, bias=False)
        self.experts = MolmoEExperts(config)

    def forward(self, x: Tensor, top_k: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts' output for the residual stream, and router logits.

        Args:
            x: `(batch, tokens, d_model)`.
            top_k: experts per token: one number, one per row `(batch,)`, or None for the trained one.

        Returns:
            `(batch, tokens, d_model)` and `(batch, tokens, experts)`.
        """
        batch, tokens, width = x.shape
        flat = self.ff_norm(x).reshape(-1, width)
        logits = self.gate(flat)
        widest, keep = spread_top_k(self.top_k if top_k is None else top_k, tokens)
        weights, experts = route(logits, widest, x.dtype)
        out = self.experts(flat, weights, experts, keep)
        return out.view(batch, tokens, width), logits.view(batch, tokens, -1)


class MolmoEBlock(nn.Module):
    """One decoder block: attention, then experts, both pre-normed and residual."""

    def __init__(self, config: MolmoEConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attn = MolmoEAttention(config)
        self.mlp = MolmoEMoE(config)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        cache: Cache | None = None,
        top_k: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block; returns the residual stream `(batch, tokens, d_model)` and the router logits."""
        q, k, v = self.attn.project(x, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        x = x + self.attn.attend(q, k, v, mask)
        mixed, router_logits = self.mlp(x, top_k)
        return x + mixed, router_logits
