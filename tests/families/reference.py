"""What every law compares the elastic loop with: one plain pass of the checkpoint, whatever its family."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from families.toy_moe import ToyAdapter, plain_pass
from families.toy_moe import naive_experts as naive_toy_experts
from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.elastic import ElasticModel


class Pass(NamedTuple):
    """The stream behind the blocks that ran, `(tokens, d_model)` each, and the logits `(tokens, vocabulary)`."""

    states: list[Tensor]
    logits: Tensor


@torch.no_grad()
def reference_pass(
    model: ElasticModel,
    prompt: EmbeddedPrompt,
    behind: Tensor,
    *,
    removed: Collection[int] = (),
    top_ks: Sequence[int] | None = None,
) -> Pass:
    """Run the checkpoint on a prompt and what follows it.

    Args:
        behind: embeddings that follow the prompt, `(more, d_model)`.
        removed: blocks that are left out.
        top_ks: experts per token, one number per block of the checkpoint; the trained one if None.
    """
    adapter = model.adapter
    if isinstance(adapter, ToyAdapter):
        each = [model.trained_top_k] * adapter.num_blocks if top_ks is None else top_ks
        return Pass(*plain_pass(adapter, prompt, behind, removed, each))
    out = adapter.model(
        inputs_embeds=torch.cat([prompt.hidden, behind])[None],
        use_cache=False,
        output_hidden_states=True,
        removed_blocks=tuple(removed),
        top_k_per_block=top_ks,
    )
    return Pass([state[0] for state in out.hidden_states[1:]], out.logits[0])


def naive_experts(model: ElasticModel, block: int, x: Tensor, top_k: int) -> Tensor:
    """One token after the other, one expert after the other; `x` is `(tokens, d_model)`."""
    if isinstance(model.adapter, ToyAdapter):
        return naive_toy_experts(model.adapter, block, x, top_k)
    mlp = model.adapter.model.model.transformer.blocks[block].mlp
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        h = mlp.ff_norm.weight * row / torch.sqrt(row.pow(2).mean() + mlp.ff_norm.eps)
        share = torch.softmax(mlp.gate.weight @ h, dim=0)
        for expert in sorted(range(share.numel()), key=lambda e: -float(share[e]))[:top_k]:
            gate, up = (mlp.experts.gate_up_proj[expert] @ h).chunk(2)
            out[t] += share[expert] * (mlp.experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def weights_of(model: ElasticModel) -> list[Tensor]:
    """All weights of a model."""
    adapter = model.adapter
    return list(adapter.weights.values()) if isinstance(adapter, ToyAdapter) else list(adapter.model.parameters())
