"""Elastic expert dispatch: every token runs its own number of experts, all of them in one grouped product per layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(router_logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Router weights and experts of each token, best first, not renormalised (OLMoE; Muennighoff et al. 2024).

    Args:
        router_logits: `(tokens, experts)`.
        top_k: experts per token.
        dtype: dtype of the returned weights.

    Returns:
        weights and expert indices, both `(tokens, top_k)`.
    """
    weights, experts = torch.topk(torch.softmax(router_logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return weights.to(dtype), experts


def _supports_grouped_mm(x: Tensor, *weights: Tensor) -> bool:
    # The grouped kernel wants rows aligned to 16 bytes; on CUDA it takes bfloat16 only.
    if x.device.type == "cuda" and x.dtype != torch.bfloat16:
        return False
    return all(w.shape[-1] * w.element_size() % 16 == 0 and w.shape[-2] * w.element_size() % 16 == 0 for w in weights)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _run_one_token(x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    # A decode step of a single request on a CPU: a grouped product walks over all experts, which takes as long with one
    # active expert as with eight; products with the active ones alone make a smaller top_k cheaper in proportion.
    out = torch.zeros_like(x)
    for expert, weight in zip(experts[0].tolist(), weights[0].unbind(), strict=True):
        inner = _swiglu(F.linear(x, gate_up_proj[expert]))
        out = torch.addcmul(out, F.linear(inner, down_proj[expert]), weight)
    return out


def _run_one_token_gathered(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    # On a CUDA device without a grouped product for this dtype: nothing that depends on which experts are active has to
    # come back to the host, so that a CUDA graph can hold it.
    active = experts[0]
    inner = _swiglu(torch.matmul(gate_up_proj[active], x[0]))
    out = torch.matmul(down_proj[active], inner.unsqueeze(-1)).squeeze(-1)
    return torch.matmul(weights, out)


def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Weighted sum of the kept experts' outputs for every token.

    Args:
        x: `(tokens, d_model)`.
        weights: `(tokens, k)`, router weights, best first.
        experts: `(tokens, k)`, expert indices.
        gate_up_proj: `(experts, 2 * expert_dim, d_model)`.
        down_proj: `(experts, d_model, expert_dim)`.
        keep: `(tokens, k)`, which of the k experts run; all of them if None.

    Returns:
        `(tokens, d_model)`.
    """
    if x.shape[0] == 1 and keep is None:
        if x.device.type == "cpu":
            return _run_one_token(x, weights, experts, gate_up_proj, down_proj)
        if not _supports_grouped_mm(x, gate_up_proj, down_proj):
            return _run_one_token_gathered(x, weights, experts, gate_up_proj, down_proj)
    num_experts = gate_up_proj.shape[0]
    pair_expert = experts.reshape(-1)
    pair_weight = weights.reshape(-1)
    pair_token = torch.arange(x.shape[0], device=x.device).repeat_interleave(experts.shape[1])
    if keep is not None:
        kept = keep.reshape(-1).nonzero().squeeze(-1)
        pair_expert, pair_weight, pair_token = pair_expert[kept], pair_weight[kept], pair_token[kept]
    pair_expert, order = torch.sort(pair_expert, stable=True)
    pair_token, pair_weight = pair_token[order], pair_weight[order]
    # Unlike counting, which asks the device for the highest number, this can be part of a CUDA graph.
    ends = torch.searchsorted(pair_expert, torch.arange(num_experts, device=x.device), right=True, out_int32=True)
    rows = x[pair_token]
    if _supports_grouped_mm(x, gate_up_proj, down_proj):
        inner = _swiglu(F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends))
        out = F.grouped_mm(inner, down_proj.transpose(1, 2), offs=ends)
    else:
        pieces = []
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        for expert, chunk in enumerate(rows.split(counts)):
            if chunk.shape[0]:
                pieces.append(_swiglu(chunk @ gate_up_proj[expert].T) @ down_proj[expert].T)
        out = torch.cat(pieces) if pieces else rows
    return torch.zeros_like(x).index_add(0, pair_token, out * pair_weight.unsqueeze(-1))
