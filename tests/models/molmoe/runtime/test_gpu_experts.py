"""Experts of many tokens in Triton kernels: what `run_experts` computes, for every top_k, tile and number of tokens."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch

from pacevlm.models import experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# As a share of the norm: a few roundings.
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
SIZES = [(64, 2048, 1024), (10, 48, 24), (8, 64, 20)]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def gpu_experts() -> ModuleType:
    from pacevlm.models.molmoe.runtime import gpu_experts

    return gpu_experts


def draw(num_tokens: int, top_k: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Residual stream, normed stream, weights and experts of each token, and the matrices; experts are not even."""
    num_experts, width, inner = sizes
    generator = torch.Generator("cuda").manual_seed(num_tokens + top_k)
    normal = [torch.randn(num_tokens, width, generator=generator, device="cuda").to(dtype) for _ in range(2)]
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator, device="cuda")
    logits += torch.arange(num_experts, device="cuda") / num_experts
    shapes = (num_experts, 2 * inner, width), (num_experts, width, inner)
    matrices = [torch.randn(s, generator=generator, device="cuda").mul(s[-1] ** -0.5).to(dtype) for s in shapes]
    return (*normal, *experts.route(logits, top_k, dtype), *matrices)  # type: ignore[return-value]


def error(out: torch.Tensor, case: Case, keep: torch.Tensor | None = None) -> float:
    residual, x, weights, chosen, gate_up, down = case
    exact = residual.float() + experts.run_experts(
        x.float(), weights.float(), chosen, gate_up.float(), down.float(), keep
    )
    return float((out.float() - exact).norm() / exact.norm())


@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17, 150, 1219])
def test_every_top_k(dtype: torch.dtype, sizes: tuple[int, int, int], num_tokens: int, gpu_experts: ModuleType) -> None:
    for top_k in range(1, 9):
        case = draw(num_tokens, top_k, sizes, dtype)
        out = gpu_experts.add_experts(*case)
        assert error(out, case) < ROUNDING[dtype]
        assert torch.equal(out, gpu_experts.add_experts(*case))


@DTYPES
def test_every_tile(dtype: torch.dtype, gpu_experts: ModuleType) -> None:
    for (_, *tiles), num_tokens in itertools.product(gpu_experts.TILES, (5, 300)):
        case = draw(num_tokens, 6, SIZES[0], dtype)
        assert error(gpu_experts.add_experts(*case, tiles=tuple(tiles)), case) < ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_of_mixed_top_k_are_what_each_is_alone(
    dtype: torch.dtype, sizes: tuple[int, int, int], gpu_experts: ModuleType
) -> None:
    case = draw(90, 8, sizes, dtype)
    residual, x, weights, chosen, *matrices = case
    x[40] = math.inf  # reaches no other token
    top_k = torch.arange(90, device="cuda") % 8 + 1
    out = gpu_experts.add_experts(*case, keep=torch.arange(8, device="cuda") < top_k[:, None])
    others = torch.arange(90, device="cuda") != 40
    assert bool(out[others].isfinite().all())
    for k in range(1, 9):
        rows = others & (top_k == k)
        alone = gpu_experts.add_experts(
            residual[rows], x[rows], weights[rows, :k].contiguous(), chosen[rows, :k].contiguous(), *matrices
        )
        difference = (out[rows].float() - alone.float()).norm() / alone.float().norm()
        assert float(difference) < ROUNDING[dtype]
