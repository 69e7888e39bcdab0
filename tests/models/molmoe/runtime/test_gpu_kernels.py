"""Every kernel computes what torch does, for widths that are no powers of two among others."""

from __future__ import annotations

import pytest
import torch

from pacevlm.models import experts
from pacevlm.models.molmoe import blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# As a share of the norm: a few roundings.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert out.shape == expected.shape
    assert bool(out.isfinite().all())
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 5, 48), (2, 7, 32)], ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from pacevlm.models.molmoe.runtime import gpu_kernels

    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
    assert error(gpu_kernels.rms_norm(x, weight, 1e-5), blocks.rms_norm(x, weight, 1e-5)) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize(("height", "width"), [(6144, 2048), (64, 2048), (17, 24), (515, 3000)])
def test_multiply_row(dtype: torch.dtype, height: int, width: int) -> None:
    from pacevlm.models.molmoe.runtime import gpu_kernels

    x, weight = draw(1, 1, width, dtype=dtype), draw(height, width, dtype=dtype, scale=width**-0.5)
    norm, residual = draw(width, dtype=dtype), draw(1, 1, height, dtype=dtype)
    assert error(gpu_kernels.multiply_row(x, weight), x.double() @ weight.double().T) < ROUNDING[dtype]
    normed = blocks.rms_norm(x, norm, 1e-5).double() @ weight.double().T
    assert error(gpu_kernels.multiply_row(x, weight, (norm, 1e-5)), normed) < ROUNDING[dtype]
    added = gpu_kernels.multiply_row(x, weight, (norm, 1e-5), residual)
    assert error(added, normed + residual.double()) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 8), (10, 3), (128, 1), (5, 5)])
def test_route(dtype: torch.dtype, num_experts: int, top_k: int) -> None:
    from pacevlm.models.molmoe.runtime import gpu_kernels

    logits = draw(33, num_experts).argsort(-1).to(dtype) / 8  # no ties, which may go either way
    weights, chosen = gpu_kernels.route(logits, top_k, dtype)
    expected, expected_chosen = experts.route(logits, top_k, dtype)
    assert bool((chosen == expected_chosen).all())
    assert error(weights, expected) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize(
    ("num_experts", "width", "inner", "top_k"),
    [(64, 2048, 1024, 8), (8, 32, 24, 4), (10, 48, 20, 1), (4, 3000, 1500, 2)],
)
def test_one_token(dtype: torch.dtype, num_experts: int, width: int, inner: int, top_k: int) -> None:
    from pacevlm.models.molmoe.runtime import gpu_kernels

    x, norm, logits = draw(1, width, dtype=dtype), draw(width, dtype=dtype), draw(1, num_experts)
    gate_up = draw(num_experts, 2 * inner, width, dtype=dtype, scale=width**-0.5)
    down = draw(num_experts, width, inner, dtype=dtype, scale=inner**-0.5)
    weights, chosen = experts.route(logits, top_k, dtype)
    exact = experts._run_one_token_gathered(
        blocks.rms_norm(x, norm, 1e-5).double(),
        weights.double(),
        chosen,
        gate_up.double(),
        down.double(),
        torch.nn.functional.silu,
    )
    added = gpu_kernels.add_experts_of_one_token(x, (norm, 1e-5), weights, chosen, gate_up, down)
    assert error(added, x.double() + exact) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "batch", "tokens", "rope_rows"),
    [(16, 16, 128, 1, 1, 1), (16, 16, 128, 1, 37, 1), (4, 2, 8, 3, 5, 3), (3, 1, 16, 2, 16, 1)],
)
def test_normalise_and_rotate(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, batch: int, tokens: int, rope_rows: int
) -> None:
    from pacevlm.models.molmoe.runtime import gpu_kernels

    query, key = heads * head_dim, kv_heads * head_dim
    projected = draw(batch, tokens, query + 2 * key, dtype=dtype)
    q_norm, k_norm = draw(query, dtype=dtype), draw(key, dtype=dtype)
    places = torch.randint(0, 500, (rope_rows, tokens), device="cuda")
    rope = blocks.rope_tables(places, head_dim, 1e4)
    outs = gpu_kernels.normalise_and_rotate(projected, q_norm, k_norm, 1e-5, rope, head_dim)
    parts = (projected[..., :query], q_norm), (projected[..., query : query + key], k_norm)
    for out, (part, weight) in zip(outs, parts, strict=True):
        normed = blocks.rms_norm(part, weight, 1e-5).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        assert error(out, blocks.rotate(normed, rope)) < ROUNDING[dtype]
    cache = torch.zeros(2, batch, kv_heads, 64, head_dim, dtype=dtype, device="cuda")
    columns = torch.randperm(64, device="cuda")[:tokens]
    gpu_kernels.normalise_and_rotate(projected, q_norm, k_norm, 1e-5, rope, head_dim, (cache[0], cache[1], columns))
    values = projected[..., query + key :].unflatten(-1, (-1, head_dim)).transpose(1, 2)
    assert torch.equal(cache[0][:, :, columns], outs[1])
    assert torch.equal(cache[1][:, :, columns], values)
    others = torch.ones(64, dtype=torch.bool, device="cuda").index_fill(0, columns, False)
    assert not bool(cache[:, :, :, others].any())
