"""Elastic dispatch of experts: each token gets its own, whatever others ask for."""

from __future__ import annotations

import pytest
import torch

from pacevlm.models.experts import route, run_experts, spread_top_k

Weights = tuple[torch.Tensor, torch.Tensor]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights() -> Weights:
    return draw(9, 16, 8, seed=0), draw(9, 8, 8, seed=3)


def run(x: torch.Tensor, top_k: list[int], weights: Weights) -> torch.Tensor:
    widest, keep = spread_top_k(torch.tensor(top_k), 1)
    return run_experts(x, *route(draw(5, 9, seed=1), widest, x.dtype), *weights, keep)


@pytest.mark.parametrize("top_k", [[1, 3, 2, 9, 5], [4, 4, 4, 4, 4], [9, 1, 1, 1, 1]], ids=str)
def test_every_token_is_the_sum_of_its_leading_experts(top_k: list[int], weights: Weights) -> None:
    x, logits, expected = draw(5, 8, seed=2), draw(5, 9, seed=1), []
    for token, count in enumerate(top_k):
        shares, chosen = route(logits[token : token + 1], count, x.dtype)
        total = torch.zeros(8)
        for share, expert in zip(shares[0], chosen[0], strict=True):
            gate, up = (weights[0][expert] @ x[token]).chunk(2)
            total += share * (weights[1][expert] @ (torch.nn.functional.silu(gate) * up))
        expected.append(total)
    torch.testing.assert_close(run(x, top_k, weights), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_one_token_that_overflows_reaches_no_other(weights: Weights) -> None:
    x, top_k = draw(5, 8, seed=2), [1, 3, 2, 9, 5]
    expected = run(x, top_k, weights)
    for token in range(5):
        broken = x.clone()
        broken[token] = float("inf")
        found = run(broken, top_k, weights)
        others = [i for i in range(5) if i != token]
        torch.testing.assert_close(found[others], expected[others])
        assert not found[token].isfinite().all()
