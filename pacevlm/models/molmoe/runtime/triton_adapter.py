"""MolmoE on a GPU with Triton kernels between its matrix products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.experts import run_experts, spread_top_k
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.blocks import MolmoEBlock, Rope
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.runtime import gpu_experts, gpu_kernels
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock

# Longer prompts keep a GPU busy for longer than launching their kernels takes.
MAX_GRAPH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class TritonBlock(FrozenBlock):
    """`FrozenBlock` with kernels where no gradient is asked for; its results are equal but for rounding."""

    def _normed_linear(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return gpu_kernels.multiply_row(x, weight, (norm, self.eps))
        return F.linear(gpu_kernels.rms_norm(x, norm, self.eps), weight)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `MolmoEAttention.project`."""
        if x.requires_grad:
            return FrozenBlock.project(self, x, rope)
        projected = self._normed_linear(x, self.attn_norm, self.att_proj)
        q, k = gpu_kernels.normalise_and_rotate(projected, self.q_norm, self.k_norm, self.eps, rope, self.head_dim)
        return q, k, self._heads(projected[..., sum(self.widths[:2]) :])

    def project_into(self, x: Tensor, rope: tuple[Tensor, ...], keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        """See `Adapter`; no gradient."""
        projected = self._normed_linear(x, self.attn_norm, self.att_proj)
        into = keys, values, places
        return gpu_kernels.normalise_and_rotate(
            projected, self.q_norm, self.k_norm, self.eps, rope, self.head_dim, into
        )[0]

    def add_attention(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `Adapter`."""
        if x.requires_grad or q.requires_grad:
            return x + self.attend(q, k, v, mask, is_causal)
        gqa = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
        mixed = mixed.transpose(1, 2).flatten(2)
        if x.numel() == x.shape[-1]:
            return gpu_kernels.multiply_row(mixed, self.attn_out, residual=x)
        return torch.addmm(x.flatten(0, 1), mixed.flatten(0, 1), self.attn_out.T).view_as(x)

    def add_experts(self, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`."""
        if x.requires_grad:
            return x + self.mix_experts(x, top_k)
        flat, (widest, keep) = x.flatten(0, 1), spread_top_k(top_k, x.shape[1])
        matrices = self.gate_up_proj, self.down_proj
        if len(flat) == 1:
            weights, experts = gpu_kernels.route(self._normed_linear(flat, self.ff_norm, self.gate), widest, x.dtype)
            norm = self.ff_norm, self.eps
            return gpu_kernels.add_experts_of_one_token(flat, norm, weights, experts, *matrices).view_as(x)
        normed = gpu_kernels.rms_norm(flat, self.ff_norm, self.eps)
        weights, experts = gpu_kernels.route(F.linear(normed, self.gate), widest, x.dtype)
        if x.dtype.itemsize == 2:
            return gpu_experts.add_experts(flat, normed, weights, experts, *matrices, keep).view_as(x)
        return x + run_experts(normed, weights, experts, *matrices, keep).view_as(x)


class TritonMolmoEAdapter(MolmoEAdapter):
    """`MolmoEAdapter` with kernels; its results are equal but for rounding."""

    compiler = "triton"

    def __init__(self, model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> None:
        super().__init__(model, processor)
        modules = model.model.transformer.blocks
        self.blocks: list[TritonBlock] = [TritonBlock.from_module(cast(MolmoEBlock, block)) for block in modules]
        self.max_graph_tokens = MAX_GRAPH_TOKENS if self.dtype.itemsize == 2 else 0

    def project_into(
        self, block: int, x: Tensor, rope: tuple[Tensor, ...], keys: Tensor, values: Tensor, places: Tensor
    ) -> Tensor:
        """See `Adapter`."""
        return self.blocks[block].project_into(x, rope, keys, values, places)

    def add_attention(
        self, block: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """See `Adapter`."""
        return self.blocks[block].add_attention(x, q, k, v, mask, is_causal)

    def add_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`."""
        return self.blocks[block].add_experts(x, top_k)

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        norm = self.model.model.transformer.ln_f
        return F.linear(gpu_kernels.rms_norm(x, norm.weight, norm.eps), self.model.lm_head.weight)


def compiles_here(device: torch.device) -> bool:
    """Whether Triton finds what it needs on this machine, a C compiler among it; warns if it does not."""
    try:
        gpu_kernels.rms_norm(torch.ones(1, 8, device=device), torch.ones(8, device=device), 1e-5)
    except Exception as error:  # whatever a compiler may say
        warnings.warn(
            f"Triton compiles nothing here, so decoding takes about twice as long: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
