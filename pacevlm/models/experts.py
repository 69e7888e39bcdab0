"""Elastic expert dispatch: every token runs its own number of experts, all of them in one grouped product per layer."""

from __future__ import annotations

from collections.abc import Callable

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


def spread_top_k(top_k: int | Tensor, num_tokens: int) -> tuple[int, Tensor | None]:
    """Experts to route every token to, and which of them run where rows differ.

    Args:
        top_k: experts per token, one number or one per row `(batch,)`.
        num_tokens: tokens per row.

    Returns:
        the largest top_k, and `(batch * num_tokens, largest)`, True where an expert runs; None if all do.
    """
    if not isinstance(top_k, Tensor):
        return top_k, None
    widest = int(top_k.max())
    if not bool((top_k != widest).any()):
        return widest, None
    per_token = top_k.repeat_interleave(num_tokens)
    return widest, torch.arange(widest, device=top_k.device) < per_token[:, None]


def _supports_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    # The grouped kernel wants rows aligned to 16 bytes; but for the CPU's it takes bfloat16 only.
    if x.device.type != "cpu" and x.dtype != torch.bfloat16:
        return False
    return all(width * weight.element_size() % 16 == 0 for width in weight.shape[1:])


# What a gate goes through.
Activation = Callable[[Tensor], Tensor]


def swiglu(gate_up: Tensor, activation: Activation = F.silu) -> Tensor:
    """Gate and value side by side, `(..., 2 * width)`, to `(..., width)` (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def _run_one_token(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: Activation
) -> Tensor:
    # A grouped product walks over all experts, which takes as long with one active expert as with eight; products with
    # the active ones alone make a smaller top_k cheaper in proportion. Everything between the products is done for all
    # of them at once, because a decode step is bound by calls.
    token, active = x[0], experts[0].tolist()
    gates = torch.stack([torch.mv(gate_up_proj[expert], token) for expert in active])
    inner = swiglu(gates, activation) * weights[0, :, None]
    out = x.new_zeros(x.shape[1])
    for expert, row in zip(active, inner.unbind(), strict=True):
        out = torch.addmv(out, down_proj[expert], row)
    return out[None]


def _run_one_token_gathered(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: Activation
) -> Tensor:
    # On an accelerator without a grouped product for this dtype: nothing that depends on which experts are active has
    # to come back to the host, so that a CUDA graph can hold it.
    active = experts[0]
    inner = swiglu(torch.matmul(gate_up_proj[active], x[0]), activation)
    out = torch.matmul(down_proj[active], inner.unsqueeze(-1)).squeeze(-1)
    return torch.matmul(weights, out)


def grouped_product(rows: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows that are sorted by expert, each with its own expert's matrix.

    Args:
        rows: `(rows, width)`.
        ends: `(experts,)` int32, where the rows of each expert end.
        weight: `(experts, out_width, width)`.

    Returns:
        `(rows, out_width)`.
    """
    if _supports_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([chunk @ weight[expert].T for expert, chunk in enumerate(rows.split(counts))])


def run_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    keep: Tensor | None = None,
    activation: Activation = F.silu,
) -> Tensor:
    """Weighted sum of the kept experts' outputs for every token.

    Args:
        x: `(tokens, d_model)`.
        weights: `(tokens, k)`, router weights, best first.
        experts: `(tokens, k)`, expert indices.
        gate_up_proj: `(experts, 2 * expert_dim, d_model)`.
        down_proj: `(experts, d_model, expert_dim)`.
        keep: `(tokens, k)`, which of the k experts run; all of them if None.
        activation: what the gates go through.

    Returns:
        `(tokens, d_model)`.
    """
    if x.shape[0] == 1 and keep is None:
        if x.device.type == "cpu":
            return _run_one_token(x, weights, experts, gate_up_proj, down_proj, activation)
        if not (_supports_grouped_mm(x, gate_up_proj) and _supports_grouped_mm(x, down_proj)):
            return _run_one_token_gathered(x, weights, experts, gate_up_proj, down_proj, activation)
    num_tokens, top_k = experts.shape
    pair_expert = experts.reshape(-1)
    kept = None if keep is None else keep.reshape(-1).nonzero().squeeze(-1)
    # Two bytes are sorted in a quarter of the passes that eight take on a GPU.
    pair_expert, order = torch.sort((pair_expert if kept is None else pair_expert[kept]).to(torch.int16), stable=True)
    pair = order if kept is None else kept[order]
    # Unlike counting, which asks the device for the highest number, this can be part of a CUDA graph.
    every = torch.arange(gate_up_proj.shape[0], dtype=torch.int16, device=x.device)
    ends = torch.searchsorted(pair_expert, every, right=True, out_int32=True)
    rows = x.index_select(0, pair.div(top_k, rounding_mode="floor"))
    out = grouped_product(swiglu(grouped_product(rows, ends, gate_up_proj), activation), ends, down_proj)
    # Back in the order of tokens: a sum of k rows each, which is quicker than adding rows where they belong, and the
    # same every time.
    place = pair.new_zeros(num_tokens * top_k).index_copy_(0, pair, torch.arange(len(pair), device=x.device))
    if keep is not None:
        # Experts that do not run have no weight, and the row of the token's first one: of another token's, an infinite
        # number would reach this one.
        weights, place = weights * keep, place.view_as(keep)
        place = torch.where(keep, place, place[:, :1]).flatten()
    return torch.matmul(weights[:, None], out.index_select(0, place).view(num_tokens, top_k, -1)).squeeze(1)
