"""Greedy decoding that keeps the logits of every step, for tests that compare them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pacevlm.knobs import Knobs
from pacevlm.models.decoder import ElasticDecoder, Generation, Prefix
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.graph_decode import GraphDecode
from pacevlm.types import Example

STEPS = 6


def generate_with_logits(
    decoder: ElasticDecoder,
    prefixes: Sequence[Prefix],
    top_k: Sequence[int],
    num_blocks: Sequence[int],
    max_new_tokens: int,
) -> tuple[list[list[int]], list[Tensor]]:
    """Generated ids of each row, and the logits of each step `(rows that were alive, vocabulary)`."""
    generation = Generation(decoder, prefixes, top_k, num_blocks, max_new_tokens)
    logits = []
    while generation.alive:
        logits.append(generation.step().clone())
    return generation.generated, logits


def prefixes_of(model: ElasticModel, examples: list[Example], tiers: tuple[str, ...]) -> list[Prefix]:
    """Prompts behind the first blocks, each example at each tier."""
    prefixes = []
    for example, tier in itertools.product(examples, tiers):
        prompt = model.adapter.encode_question(example.question)
        prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets[tier])
        embeddings = model.adapter.embed(prepared, model.adapter.encode_vision([prepared])[0])
        prefixes += model.decoder.prefix([embeddings])
    return prefixes


def generate(decoder: ElasticDecoder, prefix: Prefix, knobs: Knobs) -> tuple[list[int], Tensor]:
    """Tokens, and logits of every step `(steps, vocabulary)`."""
    generated, logits = generate_with_logits(decoder, [prefix], [knobs.top_k], [knobs.num_blocks], STEPS)
    return generated[0], torch.cat(logits)


def with_graph_steps(model: ElasticModel) -> ElasticDecoder:
    """The model's decoder with single rows as a CUDA device runs them."""
    order, after = model.decoder.order, model.stage2_after
    return ElasticDecoder(model.adapter, order, after, GraphDecode(model.adapter, order, after))


def check_same(decoder: ElasticDecoder, other: ElasticDecoder, prefix: Prefix, knobs: Knobs) -> None:
    """Both give the same tokens, and the same logits but for rounding."""
    tokens, logits = generate(decoder, prefix, knobs)
    expected_tokens, expected = generate(other, prefix, knobs)
    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
