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
from pacevlm.models.molmoe.runtime import gpu_kernels
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock


@dataclass(frozen=True, slots=True)
class TritonBlock(FrozenBlock):
    """`FrozenBlock` with kernels where no gradient is asked for; its results are equal but for rounding."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(..., width)` to `(..., rows of the weight)`."""
        is_one_row = x.numel() == x.shape[-1] and not x.requires_grad
        return gpu_kernels.multiply_row(x, weight) if is_one_row else F.linear(x, weight)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `MolmoEAttention.project`."""
        if x.requires_grad:
            return FrozenBlock.project(self, x, rope)
        projected = self.linear(gpu_kernels.rms_norm(x, self.attn_norm, self.eps), self.att_proj)
        q, k = gpu_kernels.normalise_and_rotate(projected, self.q_norm, self.k_norm, self.eps, rope, self.head_dim)
        return q, k, self._heads(projected[..., sum(self.widths[:2]) :])

    def mix_experts(self, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `MolmoEMoE.forward`; `(batch, tokens, d_model)` to the same shape."""
        if x.requires_grad:
            return FrozenBlock.mix_experts(self, x, top_k)
        flat = gpu_kernels.rms_norm(x, self.ff_norm, self.eps).flatten(0, 1)
        widest, keep = spread_top_k(top_k, x.shape[1])
        weights, experts = gpu_kernels.route(self.linear(flat, self.gate), widest, x.dtype)
        if len(flat) == 1:
            return gpu_kernels.run_one_token(flat, weights, experts, self.gate_up_proj, self.down_proj).view_as(x)
        return run_experts(flat, weights, experts, self.gate_up_proj, self.down_proj, keep).view_as(x)


class TritonMolmoEAdapter(MolmoEAdapter):
    """`MolmoEAdapter` with kernels; its results are equal but for rounding."""

    compiler = "triton"

    def __init__(self, model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> None:
        super().__init__(model, processor)
        self.blocks = [TritonBlock.from_module(cast(MolmoEBlock, block)) for block in model.model.transformer.blocks]

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
