"""Blocks as others run them: modules, with transformers' own experts or a loop over all, as first published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from pacevlm.models.elastic import ElasticModel


def run_experts_in_a_loop(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, keep: Tensor | None = None
) -> Tensor:
    """What `pacevlm.models.experts.run_experts` computes, expert by expert; shapes as there."""
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


class _ModuleBlock:
    """A block of the adapter that calls the checkpoint's modules, as transformers' own forward does."""

    def __init__(self, block: Any) -> None:
        self.project, self.attend, self._mlp = block.attn.project, block.attn.attend, block.mlp

    def mix_experts(self, x: Tensor, top_k: int | Tensor) -> Tensor:
        """`(batch, tokens, d_model)` to the same shape."""
        out: Tensor = self._mlp(x, top_k)[0]
        return out


@contextmanager
def _replaced(model: ElasticModel, forward_of: Callable[[Any], Callable[..., Tensor]]) -> Iterator[None]:
    blocks: list[Any] = list(model.adapter.model.model.transformer.blocks)
    own, modules = model.adapter.blocks, [block.mlp.experts for block in blocks]
    graph, model.decoder.graph = model.decoder.graph, None  # it would replay its own blocks
    for module in modules:
        module.forward = forward_of(module)
    model.adapter.blocks = [_ModuleBlock(block) for block in blocks]
    try:
        yield
    finally:
        model.adapter.blocks, model.decoder.graph = own, graph
        for module in modules:
            del module.forward


def loop_over_experts(model: ElasticModel) -> AbstractContextManager[None]:
    """Run a model's blocks as modules, their experts in a loop over all of them, while the context is open."""

    def forward_of(module: Any) -> Callable[..., Tensor]:
        return lambda x, weights, experts, keep=None: run_experts_in_a_loop(
            x, weights, experts, module.gate_up_proj, module.down_proj, keep
        )

    return _replaced(model, forward_of)


def transformers_experts(model: ElasticModel) -> AbstractContextManager[None]:
    """Run a model's blocks as modules, their experts as transformers' OLMoE module, while the context is open."""

    def forward_of(module: Any) -> Callable[..., Tensor]:
        num_experts, d_model, expert_dim = module.down_proj.shape
        config = OlmoeConfig(hidden_size=d_model, intermediate_size=expert_dim, num_experts=num_experts)
        config._experts_implementation = "eager"
        with torch.device("meta"):
            theirs = OlmoeExperts(config)
        theirs.gate_up_proj, theirs.down_proj = module.gate_up_proj, module.down_proj

        def forward(x: Tensor, weights: Tensor, experts: Tensor, keep: Tensor | None = None) -> Tensor:
            assert keep is None
            return theirs(x, experts, weights)

        return forward

    return _replaced(model, forward_of)
