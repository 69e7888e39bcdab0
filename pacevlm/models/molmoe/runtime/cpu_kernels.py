"""The compiled loops of `cpu_loops` as functions of tensors, and of arrays for one token; needs the extra `cpu`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pacevlm.models.molmoe.blocks import Rope
from pacevlm.models.molmoe.runtime import cpu_loops
from pacevlm.models.molmoe.runtime.cpu_loops import Floats


def as_floats(x: Tensor) -> Floats:
    """A tensor's values without a copy where it is contiguous already."""
    return x.contiguous().numpy()


def embed(ids: Tensor, embedding: Floats, new_embedding: Floats, features: Tensor, places: Tensor) -> Tensor:
    """Token embeddings with image features added at their places; see `MolmoEModel.embed`, for a single row.

    Args:
        ids: `(tokens,)`, none negative.
        features: `(crops, cells, d_model)`.
        places: `(crops, cells)`.

    Raises:
        ValueError: an id or a place is outside its range.
    """
    num_ids = embedding.shape[0] + new_embedding.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= num_ids:
        raise ValueError(f"a token id is outside 0..{num_ids - 1}, the rows of the embedding")
    if int(places.max()) >= ids.shape[0]:
        raise ValueError(f"an image feature has a place beyond the {ids.shape[0]} tokens of the prompt")
    width = embedding.shape[1]
    out = np.empty((ids.shape[0], width), np.float32)
    cells, flat_places = as_floats(features).reshape(-1, width), places.contiguous().numpy().reshape(-1)
    cpu_loops.embed(ids.contiguous().numpy(), embedding, new_embedding, cells, flat_places, out)
    return torch.from_numpy(out)


def rms_norm(x: Tensor, weight: Floats, eps: np.float32) -> Tensor:
    """See `pacevlm.models.molmoe.blocks.rms_norm`; any shape `(..., width)`."""
    out = np.empty(x.shape, np.float32)
    width = x.shape[-1]
    cpu_loops.normalise_rows(as_floats(x).reshape(-1, width), weight, eps, out.reshape(-1, width))
    return torch.from_numpy(out)


def normalise_and_rotate(projected: Tensor, q_norm: Floats, k_norm: Floats, eps: np.float32, rope: Rope) -> Tensor:
    """Queries and keys of `projected` `(batch, tokens, widths)`, one behind the other.

    Returns:
        `(batch, query heads + key heads, tokens, head_dim)`.
    """
    batch, num_tokens, width = projected.shape
    cos, sin = (as_floats(table) for table in rope)
    head_dim = cos.shape[-1]
    out = np.empty((batch, (q_norm.shape[0] + k_norm.shape[0]) // head_dim, num_tokens, head_dim), np.float32)
    rows = as_floats(projected).reshape(-1, width)
    # The tables hold the rows of one prompt, shared by all of them, or those of each.
    cpu_loops.normalise_and_rotate(rows, q_norm, k_norm, eps, cos.reshape(-1, head_dim), sin.reshape(-1, head_dim), out)
    return torch.from_numpy(out)


def attend_one_token(
    x: Floats,
    norm: Floats,
    eps: np.float32,
    att_proj: Floats,
    q_norm: Floats,
    k_norm: Floats,
    rope: tuple[Floats, Floats],
    cache: tuple[Floats, Floats],
    position: int,
    attn_out: Floats,
) -> None:
    """Attention of one new token, added to `x` `(d_model,)`; its key and value are written into the cache.

    Args:
        rope: cosines and sines of the position, each `(head_dim,)`.
        cache: keys and values, each `(heads, capacity, head_dim)`, of which `position` are in use.
    """
    cpu_loops.attend_one_token(x, norm, eps, att_proj, q_norm, k_norm, *rope, *cache, position, attn_out)


def mix_one_token(
    x: Floats, norm: Floats, eps: np.float32, gate: Floats, gate_up_proj: Floats, down_proj: Floats, top_k: int
) -> Floats:
    """Norm, router and experts of one token, `(d_model,)` to the same shape."""
    out = np.empty_like(x)
    cpu_loops.mix_one_token(x, norm, eps, gate, gate_up_proj, down_proj, top_k, out)
    return out


def group_by_expert(router_logits: Tensor, top_k: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Route tokens and sort the (token, expert) pairs by expert.

    Args:
        router_logits: `(tokens, experts)`.
        top_k: experts per token, one number or one per token `(tokens,)`.

    Returns:
        token and router weight of every pair `(pairs,)`, and where each expert's pairs end `(experts,)` int32.
    """
    logits = as_floats(router_logits)
    counts = top_k.numpy() if isinstance(top_k, Tensor) else np.full(logits.shape[0], top_k, np.int64)
    num_pairs = int(counts.sum())
    pair_token, pair_weight = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.float32)
    ends = np.empty(logits.shape[1], np.int32)
    cpu_loops.group(logits, counts, pair_token, pair_weight, ends)
    return torch.from_numpy(pair_token), torch.from_numpy(pair_weight), torch.from_numpy(ends)


def weighted_sum(rows: Tensor, pair_token: Tensor, pair_weight: Tensor, num_tokens: int) -> Tensor:
    """Add the weighted outputs of pairs `(pairs, d_model)` up for each token, `(tokens, d_model)`."""
    out = np.empty((num_tokens, rows.shape[1]), np.float32)
    cpu_loops.scatter(as_floats(rows), pair_token.numpy(), pair_weight.numpy(), out)
    return torch.from_numpy(out)


def multiply_few_rows(
    rows: Tensor, ends: Tensor, weight: Floats, pair_token: Tensor, pair_weight: Tensor, num_tokens: int
) -> Tensor:
    """`weighted_sum` of the products of `pacevlm.models.experts.grouped_product`, where experts have few rows.

    A library's product of a dozen rows takes longer to set up than to compute: for 16 experts with 16 rows of 128 by 96
    it takes twice as long as this (docs/log.md).
    """
    out = np.empty((num_tokens, weight.shape[1]), np.float32)
    cpu_loops.multiply_and_scatter(as_floats(rows), ends.numpy(), weight, pair_token.numpy(), pair_weight.numpy(), out)
    return torch.from_numpy(out)
