"""Decoder blocks on a CPU in float32, their small steps compiled, and decode steps made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.experts import grouped_product, swiglu
from pacevlm.models.molmoe.blocks import Rope
from pacevlm.models.molmoe.runtime import cpu_kernels
from pacevlm.models.molmoe.runtime.cpu_kernels import as_floats
from pacevlm.models.molmoe.runtime.cpu_loops import Floats
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock

ONE_CORE_WEIGHTS = 1_000_000
"""Largest projection that one core multiplies with a single token; larger ones are bound by memory, which all share."""

FEW_ROWS = 32
"""Rows per expert up to which a compiled product is quicker than the library's."""


class CompiledBlock:
    """`FrozenBlock` with compiled loops in place of its small operations; equal to it but for rounding.

    Where a gradient is asked for, it is `FrozenBlock`.

    Args:
        block: the block; its weights are float32 on a CPU and are shared.
    """

    def __init__(self, block: FrozenBlock) -> None:
        self.block = block
        self.eps = np.float32(block.eps)
        self.attn_norm, self.att_proj = as_floats(block.attn_norm), as_floats(block.att_proj)
        self.q_norm, self.k_norm = as_floats(block.q_norm), as_floats(block.k_norm)
        self.attn_out = as_floats(block.attn_out)
        self.ff_norm, self.gate = as_floats(block.ff_norm), as_floats(block.gate)
        self.gate_up_proj, self.down_proj = as_floats(block.gate_up_proj), as_floats(block.down_proj)
        self.is_small = self.att_proj.size <= ONE_CORE_WEIGHTS
        self.attend = block.attend

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `MolmoEAttention.project`."""
        if x.requires_grad:
            return self.block.project(x, rope)
        projected = F.linear(cpu_kernels.rms_norm(x, self.attn_norm, self.eps), self.block.att_proj)
        qk = cpu_kernels.normalise_and_rotate(projected, self.q_norm, self.k_norm, self.eps, rope)
        query, key, _ = self.block.widths
        num_heads = query // self.block.head_dim
        v = projected[..., query + key :].unflatten(-1, (-1, self.block.head_dim)).transpose(1, 2)
        return qk[:, :num_heads], qk[:, num_heads:], v

    def mix_experts(self, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `MolmoEMoE.forward`; `(batch, tokens, d_model)` to the same shape."""
        if x.requires_grad:
            return self.block.mix_experts(x, top_k)
        batch, num_tokens, _ = x.shape
        if isinstance(top_k, Tensor):
            top_k = top_k.repeat_interleave(num_tokens)
        elif batch == num_tokens == 1:
            if not self.is_small:
                return self.block.mix_experts(x, top_k)
            return torch.from_numpy(self._mix_one_token(as_floats(x).reshape(-1), top_k)).view_as(x)
        flat = cpu_kernels.rms_norm(x, self.ff_norm, self.eps).flatten(0, 1)
        pair_token, pair_weight, ends = cpu_kernels.group_by_expert(F.linear(flat, self.block.gate), top_k)
        inner = swiglu(grouped_product(flat.index_select(0, pair_token), ends, self.block.gate_up_proj))
        if self.is_small and inner.shape[0] <= FEW_ROWS * ends.shape[0]:
            out = cpu_kernels.multiply_few_rows(inner, ends, self.down_proj, pair_token, pair_weight, flat.shape[0])
        else:
            rows = grouped_product(inner, ends, self.block.down_proj)
            out = cpu_kernels.weighted_sum(rows, pair_token, pair_weight, flat.shape[0])
        return out.view_as(x)

    def decode(
        self, x: Floats, rope: tuple[Floats, Floats], cache: tuple[Floats, Floats], position: int, top_k: int
    ) -> None:
        """Run the whole block on one new token `(d_model,)`, in place; see `cpu_kernels.attend_one_token`."""
        cpu_kernels.attend_one_token(
            x, self.attn_norm, self.eps, self.att_proj, self.q_norm, self.k_norm, rope, cache, position, self.attn_out
        )
        x += self._mix_one_token(x, top_k)

    def _mix_one_token(self, x: Floats, top_k: int) -> Floats:
        weights = (self.gate, self.gate_up_proj, self.down_proj)
        return cpu_kernels.mix_one_token(x, self.ff_norm, self.eps, *weights, top_k)


class CompiledDecode:
    """Steps of one row without torch in them; see `pacevlm.models.adapter.RowDecode`.

    Args:
        blocks: all blocks of the model.
        rope: cosines and sines of all positions, each `(positions, head_dim)`.
        num_tokens: most tokens of the row.
    """

    def __init__(self, blocks: Sequence[CompiledBlock], rope: tuple[Floats, Floats], num_tokens: int) -> None:
        self._blocks, self._rope, self._num_tokens = blocks, rope, num_tokens
        self._caches: dict[int, tuple[Floats, Floats]] = {}

    def load(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Take over the prompt's keys and values of a block, each `(1, heads, tokens, head_dim)`."""
        _, num_heads, num_tokens, head_dim = keys.shape
        cache = np.empty((2, num_heads, self._num_tokens, head_dim), np.float32)
        cache[0, :, :num_tokens], cache[1, :, :num_tokens] = keys[0].numpy(), values[0].numpy()
        self._caches[block] = cache[0], cache[1]

    def run(self, x: Tensor, position: int, top_k_of: Mapping[int, int]) -> Tensor:
        """Run blocks on one new token, `(1, d_model)` to the same shape."""
        # A copy, because blocks write in place.
        token = np.array(x[0].numpy())
        cos, sin = self._rope
        rope = cos[position], sin[position]
        for block, top_k in top_k_of.items():
            self._blocks[block].decode(token, rope, self._caches[block], position, top_k)
        return torch.from_numpy(token)[None]
