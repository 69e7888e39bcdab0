"""Greedy decoding that keeps the logits of every step, for tests that compare them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pacevlm.models.decoder import ElasticDecoder, Generation, Prefix


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
