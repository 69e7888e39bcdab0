"""A decoder block without its modules: the same computation on its weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.experts import route, run_experts, spread_top_k
from pacevlm.models.molmoe.blocks import MolmoEBlock, Rope, rms_norm, rotate


@dataclass(frozen=True, slots=True)
class FrozenBlock:
    """What `MolmoEBlock` computes, for weights that are neither trained nor moved any more.

    A decode step of one request is bound by calls on a CPU, and calling modules and looking up their parameters is a
    good part of a small model's step (docs/log.md). Here weights are plain attributes; they share the modules' memory.

    Attributes:
        attn_norm, q_norm, k_norm, ff_norm: weights of the norms.
        att_proj, attn_out: weights of the attention's projections.
        gate: weights of the router.
        gate_up_proj, down_proj: weights of the experts; see `run_experts`.
        eps: of the norms.
        widths: of queries, keys and values.
        head_dim: width of a head.
    """

    attn_norm: Tensor
    att_proj: Tensor
    q_norm: Tensor
    k_norm: Tensor
    attn_out: Tensor
    ff_norm: Tensor
    gate: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    eps: float
    widths: tuple[int, int, int]
    head_dim: int

    @classmethod
    def from_module(cls, block: MolmoEBlock) -> Self:
        """Take a block's weights."""
        attn, mlp = block.attn, block.mlp
        query, key, value = attn.splits
        return cls(
            attn_norm=attn.attn_norm.weight.detach(),
            att_proj=attn.att_proj.weight.detach(),
            q_norm=attn.q_norm.weight.detach(),
            k_norm=attn.k_norm.weight.detach(),
            attn_out=attn.attn_out.weight.detach(),
            ff_norm=mlp.ff_norm.weight.detach(),
            gate=mlp.gate.weight.detach(),
            gate_up_proj=mlp.experts.gate_up_proj.detach(),
            down_proj=mlp.experts.down_proj.detach(),
            eps=attn.attn_norm.eps,
            widths=(query, key, value),
            head_dim=attn.head_dim,
        )

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `MolmoEAttention.project`."""
        query, key, _ = self.widths
        projected = F.linear(rms_norm(x, self.attn_norm, self.eps), self.att_proj)
        qk, v = projected[..., : query + key], projected[..., query + key :]
        if query == key:
            # Both are normalised side by side, for half as many calls.
            weight = torch.stack([self.q_norm, self.k_norm])
            qk = rms_norm(qk.unflatten(-1, (2, query)), weight, self.eps).flatten(-2)
        else:
            q, k = rms_norm(qk[..., :query], self.q_norm, self.eps), rms_norm(qk[..., query:], self.k_norm, self.eps)
            qk = torch.cat([q, k], dim=-1)
        qk = rotate(self._heads(qk), rope)
        num_heads = query // self.head_dim
        return qk[:, :num_heads], qk[:, num_heads:], self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `MolmoEAttention.attend`."""
        gqa = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.attn_out)

    def mix_experts(self, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `MolmoEMoE.forward`; `(batch, tokens, d_model)` to the same shape."""
        flat = rms_norm(x, self.ff_norm, self.eps).flatten(0, 1)
        widest, keep = spread_top_k(top_k, x.shape[1])
        weights, experts = route(F.linear(flat, self.gate), widest, x.dtype)
        return run_experts(flat, weights, experts, self.gate_up_proj, self.down_proj, keep).view_as(x)
