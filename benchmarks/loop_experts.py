"""The experts as mixture-of-experts models were first published for transformers: a Python loop over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.elastic import ElasticModel


def run_experts_in_a_loop(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, keep: Tensor | None = None
) -> Tensor:
    """What `pacevlm.models.molmoe.experts.run_experts` computes, expert by expert; shapes as there."""
    assert keep is None
    num_experts = gate_up_proj.shape[0]
    out = torch.zeros_like(x)
    chosen = F.one_hot(experts, num_experts).permute(2, 1, 0)
    for expert in range(num_experts):
        place, token = torch.where(chosen[expert])
        gate, up = F.linear(x[token], gate_up_proj[expert]).chunk(2, dim=-1)
        current = F.linear(F.silu(gate) * up, down_proj[expert]) * weights[token, place, None]
        out.index_add_(0, token, current.to(x.dtype))
    return out


@contextmanager
def loop_over_experts(model: ElasticModel) -> Iterator[None]:
    """Run a model's experts in a loop while the context is open."""
    modules: list[Any] = [block.mlp.experts for block in model.adapter.blocks]

    def forward_of(module: Any) -> Any:
        return lambda x, weights, experts, keep=None: run_experts_in_a_loop(
            x, weights, experts, module.gate_up_proj, module.down_proj, keep
        )

    for module in modules:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
