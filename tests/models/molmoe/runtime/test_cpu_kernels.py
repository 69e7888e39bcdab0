"""What is made of compiled loops computes what torch computes, but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pacevlm.models.elastic import ElasticModel
from pacevlm.models.experts import grouped_product, route
from pacevlm.models.molmoe.runtime import cpu_kernels
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.types import Example


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_grouping_is_routing_sorted_by_expert() -> None:
    logits = random(50, 9)
    counts = torch.randint(1, 6, (50,), generator=torch.Generator().manual_seed(1))
    for top_k in (4, counts):
        token, weight, ends = cpu_kernels.group_by_expert(logits, top_k)
        weights, experts = route(logits, 5, torch.float32)
        keep = torch.arange(5) < (torch.full((50,), top_k) if isinstance(top_k, int) else top_k)[:, None]
        start = 0
        for expert, end in enumerate(ends.tolist()):
            chosen = (experts == expert) & keep
            assert token[start:end].tolist() == chosen.any(1).nonzero().flatten().tolist()
            close(weight[start:end], (weights * chosen).sum(1)[chosen.any(1)])
            start = end
        assert start == len(token) == int(keep.sum())


def test_experts_with_equal_logits_are_taken_once_each() -> None:
    token, weight, ends = cpu_kernels.group_by_expert(torch.zeros(3, 6), 4)
    assert ends.tolist() == [3, 6, 9, 12, 12, 12]
    assert token.tolist() == [0, 1, 2] * 4
    close(weight, torch.full((12,), 1 / 6))


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("num_outputs", [1, 3, 8])
def test_products_of_few_rows(width: int, num_outputs: int) -> None:
    ends = torch.tensor([0, 1, 5, 5, 14], dtype=torch.int32)
    rows, weight = random(14, width), random(5, num_outputs, width, seed=1)
    token = torch.randint(0, 6, (14,), generator=torch.Generator().manual_seed(2))
    share = torch.rand(14, generator=torch.Generator().manual_seed(3))
    found = cpu_kernels.multiply_few_rows(rows, ends, weight.numpy(), token, share, 6)
    products = grouped_product(rows, ends, weight)
    close(found, torch.zeros(6, num_outputs).index_add_(0, token, products * share[:, None]))
    close(found, cpu_kernels.weighted_sum(products, token, share, 6))


@torch.no_grad()
def test_embeddings_and_their_places(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    adapter: Any = tiny_elastic.adapter
    prepared = adapter.prepare(law_examples[3].image, adapter.encode_question("How many?"), 4)
    features = adapter.encode_vision([prepared])[0]
    close(adapter.embed(prepared, features).hidden, MolmoEAdapter.embed(adapter, prepared, features).hidden)
    weights = (adapter._embedding, adapter._new_embedding, features)
    ids, places = prepared.input_ids, prepared.image_input_idx
    num_ids = len(adapter._embedding) + len(adapter._new_embedding)
    for wrong in (-1, num_ids):
        with pytest.raises(ValueError, match=f"outside 0..{num_ids - 1}"):
            cpu_kernels.embed(torch.where(ids == ids[-1], wrong, ids), *weights, places)
    with pytest.raises(ValueError, match=f"beyond the {len(ids)} tokens"):
        cpu_kernels.embed(ids, *weights, torch.where(places == places.max(), len(ids), places))
