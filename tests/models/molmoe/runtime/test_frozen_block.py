"""A block without its modules computes what the block computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.blocks import rope_tables
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock

MakeModel = Callable[..., MolmoEForConditionalGeneration]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("top_k", [3, 1, torch.tensor([1, 4])])
@torch.no_grad()
def test_weights_alone_do_what_the_modules_do(
    make_model: MakeModel, dtype: torch.dtype, num_kv_heads: int, num_tokens: int, top_k: int | torch.Tensor
) -> None:
    model = make_model(seed=1, n_kv_heads=num_kv_heads).to(dtype)
    block: Any = model.model.transformer.blocks[1]
    frozen = FrozenBlock.from_module(block)
    x = torch.randn(2, num_tokens, model.config.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    rope = rope_tables(3 + torch.arange(num_tokens)[None], model.config.head_dim_, model.config.rope_theta)
    q, k, v = frozen.project(x, rope)
    expected = block.attn.project(x, rope)
    for one, other in zip((q, k, v), expected, strict=True):
        assert torch.equal(one, other)
    attended = frozen.attend(q, k, v, None, is_causal=True)
    assert torch.equal(attended, block.attn.attend(*expected, None, is_causal=True))
    assert torch.equal(frozen.mix_experts(x + attended, top_k), block.mlp(x + attended, top_k)[0])


def test_weights_are_the_modules_own(make_model: MakeModel) -> None:
    block: Any = make_model().model.transformer.blocks[0]
    frozen = FrozenBlock.from_module(block)
    for parameter in block.parameters():
        assert any(
            isinstance(weight, torch.Tensor) and weight.data_ptr() == parameter.data_ptr() and not weight.requires_grad
            for weight in (getattr(frozen, name) for name in FrozenBlock.__slots__)
        )
