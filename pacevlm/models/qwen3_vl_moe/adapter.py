"""Qwen3-VL-MoE (Qwen team 2025): Qwen3-VL with experts in place of the dense layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLMoeForConditionalGeneration

from pacevlm.models.experts import run_experts, spread_top_k
from pacevlm.models.qwen3_vl.adapter import Qwen3VLAdapter


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """Adapter of a Qwen3-VL-MoE model; see `pacevlm.models.adapter.Adapter` for the methods."""

    def __init__(
        self, model: Qwen3VLMoeForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image_processor: Any
    ) -> None:
        super().__init__(model, tokenizer, image_processor)
        config: Any = model.config.text_config
        self.num_experts: int = config.num_experts
        self.trained_top_k: int = config.num_experts_per_tok

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`; kept weights are renormalised, and a block without experts ignores top_k."""
        layer = self.layers[block]
        if not hasattr(layer.mlp, "experts"):
            return super().mix_experts(block, x, top_k)
        flat: Tensor = layer.post_attention_layernorm(x).flatten(0, 1)
        widest, keep = spread_top_k(top_k, x.shape[1])
        shares = F.linear(flat, layer.mlp.gate.weight).softmax(-1, dtype=torch.float32)
        weights, experts = shares.topk(widest, dim=-1)
        if keep is not None:
            weights = weights * keep
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        of_layer = layer.mlp.experts
        return run_experts(flat, weights, experts, of_layer.gate_up_proj, of_layer.down_proj, keep).view_as(x)
