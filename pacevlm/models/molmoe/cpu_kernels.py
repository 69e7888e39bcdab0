"""Compiled loops for a CPU, float32: what a block does between its large matrix products, and all of it for one token.

On a CPU a small block is bound by the calls that it is made of, not by arithmetic or memory: with torch alone they are
nine tenths of a decode step of the embedded model (docs/log.md). numba compiles each of these loops into one call. They
run on one core; large matrix products stay with torch, which uses all of them.

Needs the extra `cpu`. Compiled code is kept on disk beside this file or in numba's own cache directory, so that only
the first process waits for the compiler, some ten seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba import float32, int32, int64, void
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Rope = tuple[Tensor, Tensor]
_Function = TypeVar("_Function", bound=Callable[..., None])

# Sums may be taken in any order, which lets them be vectorised; infinities and NaN keep their meaning. A loop that sums
# must write to no array: where one it reads might overlap with one it writes, the compiler vectorises behind a check of
# their addresses, and the order of the sum, and with it the last bit, would depend on where memory happens to lie.
_FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}

_vector, _matrix, _matrices = float32[::1], float32[:, ::1], float32[:, :, ::1]


def _compiled(signature: Any) -> Callable[[_Function], _Function]:
    """Compile now and for these types only, so that no request ever waits for the compiler."""

    def compile_function(function: _Function) -> _Function:
        options: dict[str, Any] = {"fastmath": _FAST_MATH, "nogil": True}
        try:
            compiled: _Function = numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no directory to keep the compiled code in can be written to
            compiled = numba.njit(signature, **options)(function)
        return compiled

    return compile_function


@_compiled(void(_vector, _vector, float32, _vector))
def _normalise(x: Floats, weight: Floats, eps: np.float32, out: Floats) -> None:
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * scale * weight[i]


@_compiled(void(_matrix, _vector, _vector))
def _multiply(matrix: Floats, x: Floats, out: Floats) -> None:
    for row in range(matrix.shape[0]):
        total = np.float32(0)
        for i in range(matrix.shape[1]):
            total += matrix[row, i] * x[i]
        out[row] = total


@_compiled(void(_matrix, _vector, float32, _matrix))
def _normalise_rows(x: Floats, weight: Floats, eps: np.float32, out: Floats) -> None:
    for row in range(x.shape[0]):
        _normalise(x[row], weight, eps, out[row])


@_compiled(void(_vector, _vector, _vector, _matrix))
def _rotate(x: Floats, cos: Floats, sin: Floats, out: Floats) -> None:
    """Rotate heads that lie one behind the other; `out` is `(heads, head_dim)`."""
    half = cos.shape[0] // 2
    for head in range(out.shape[0]):
        start = head * 2 * half
        for i in range(half):
            first, second = x[start + i], x[start + half + i]
            out[head, i] = first * cos[i] + second * sin[i]
            out[head, half + i] = second * cos[half + i] + first * sin[half + i]


@_compiled(void(_matrix, _vector, _vector, float32, _matrix, _matrix, float32[:, :, :, ::1]))
def _normalise_and_rotate(
    projected: Floats, q_norm: Floats, k_norm: Floats, eps: np.float32, cos: Floats, sin: Floats, out: Floats
) -> None:
    num_q = q_norm.shape[0] // out.shape[3]
    num_tokens = out.shape[2]
    queries, keys = np.empty(q_norm.shape[0], np.float32), np.empty(k_norm.shape[0], np.float32)
    q_heads = np.empty((num_q, out.shape[3]), np.float32)
    k_heads = np.empty((out.shape[1] - num_q, out.shape[3]), np.float32)
    for row in range(projected.shape[0]):
        batch, token = row // num_tokens, row % num_tokens
        place = row % cos.shape[0]
        values = projected[row]
        _normalise(values[: q_norm.shape[0]], q_norm, eps, queries)
        _normalise(values[q_norm.shape[0] : q_norm.shape[0] + k_norm.shape[0]], k_norm, eps, keys)
        _rotate(queries, cos[place], sin[place], q_heads)
        _rotate(keys, cos[place], sin[place], k_heads)
        for head in range(out.shape[1]):
            heads = q_heads[head] if head < num_q else k_heads[head - num_q]
            out[batch, head, token, :] = heads


@_compiled(void(_vector, _vector, float32, _matrix, _vector))
def _normalise_and_multiply(x: Floats, weight: Floats, eps: np.float32, matrix: Floats, out: Floats) -> None:
    normalised = np.empty(x.shape[0], np.float32)
    _normalise(x, weight, eps, normalised)
    _multiply(matrix, normalised, out)


@_compiled(void(_vector, int64[::1], _vector))
def _choose(logits: Floats, experts: NDArray[np.int64], weights: Floats) -> None:
    """The best experts and their router weights, best first; the lower index wins a tie."""
    shares = np.empty(logits.shape[0], np.float32)
    highest = logits[0]
    for expert in range(logits.shape[0]):
        highest = max(highest, logits[expert])
    total = np.float32(0)
    for expert in range(logits.shape[0]):
        shares[expert] = math.exp(logits[expert] - highest)
    # Apart from the loop that writes: see _FAST_MATH.
    for expert in range(logits.shape[0]):
        total += shares[expert]
    for place in range(experts.shape[0]):
        best = 0
        for expert in range(1, shares.shape[0]):
            if shares[expert] > shares[best]:
                best = expert
        experts[place], weights[place] = best, shares[best] / total
        shares[best] = np.float32(-1)


@_compiled(void(_matrix, int64[::1], int64[::1], _vector, int32[::1]))
def _group(
    logits: Floats,
    top_k: NDArray[np.int64],
    pair_token: NDArray[np.int64],
    pair_weight: Floats,
    ends: NDArray[np.int32],
) -> None:
    # Counting sort of (token, expert) pairs by expert, tokens in order.
    num_tokens, widest = logits.shape[0], top_k.max()
    experts, weights = np.empty((num_tokens, widest), np.int64), np.empty((num_tokens, widest), np.float32)
    counts = np.zeros(ends.shape[0], np.int64)
    for token in range(num_tokens):
        k = top_k[token]
        _choose(logits[token], experts[token, :k], weights[token, :k])
        for place in range(k):
            counts[experts[token, place]] += 1
    total = 0
    for expert in range(ends.shape[0]):
        start, total = total, total + counts[expert]
        counts[expert], ends[expert] = start, total
    for token in range(num_tokens):
        for place in range(top_k[token]):
            expert = experts[token, place]
            pair_token[counts[expert]], pair_weight[counts[expert]] = token, weights[token, place]
            counts[expert] += 1


@_compiled(void(_matrix, int64[::1], _vector, _matrix))
def _scatter(rows: Floats, pair_token: NDArray[np.int64], pair_weight: Floats, out: Floats) -> None:
    out[:] = np.float32(0)
    for pair in range(rows.shape[0]):
        token, weight = pair_token[pair], pair_weight[pair]
        for i in range(out.shape[1]):
            out[token, i] += weight * rows[pair, i]


@_compiled(void(_vector, int64, float32, float32, float32, float32))
def _add_three(out: Floats, at: int, weight: np.float32, a: np.float32, b: np.float32, c: np.float32) -> None:
    out[at] += weight * a
    out[at + 1] += weight * b
    out[at + 2] += weight * c


@_compiled(void(_matrix, int32[::1], _matrices, int64[::1], _vector, _matrix))
def _multiply_and_scatter(
    rows: Floats,
    ends: NDArray[np.int32],
    matrices: Floats,
    pair_token: NDArray[np.int64],
    pair_weight: Floats,
    out: Floats,
) -> None:
    # Tiles of 4 rows and 3 outputs: their 12 sums and what is read for them just fit into 16 vector registers.
    out[:] = np.float32(0)
    width, num_outputs = rows.shape[1], out.shape[1]
    start = 0
    for expert in range(matrices.shape[0]):
        end, matrix = ends[expert], matrices[expert]
        tiled_end = start + (end - start) // 4 * 4
        for n in range(0, num_outputs - 2, 3):
            w0, w1, w2 = matrix[n], matrix[n + 1], matrix[n + 2]
            for r in range(start, tiled_end, 4):
                x0, x1, x2, x3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
                a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = np.float32(0)
                for i in range(width):
                    a0 += x0[i] * w0[i]
                    a1 += x0[i] * w1[i]
                    a2 += x0[i] * w2[i]
                    b0 += x1[i] * w0[i]
                    b1 += x1[i] * w1[i]
                    b2 += x1[i] * w2[i]
                    c0 += x2[i] * w0[i]
                    c1 += x2[i] * w1[i]
                    c2 += x2[i] * w2[i]
                    d0 += x3[i] * w0[i]
                    d1 += x3[i] * w1[i]
                    d2 += x3[i] * w2[i]
                _add_three(out[pair_token[r]], n, pair_weight[r], a0, a1, a2)
                _add_three(out[pair_token[r + 1]], n, pair_weight[r + 1], b0, b1, b2)
                _add_three(out[pair_token[r + 2]], n, pair_weight[r + 2], c0, c1, c2)
                _add_three(out[pair_token[r + 3]], n, pair_weight[r + 3], d0, d1, d2)
            for r in range(tiled_end, end):
                x0 = rows[r]
                a0 = a1 = a2 = np.float32(0)
                for i in range(width):
                    a0 += x0[i] * w0[i]
                    a1 += x0[i] * w1[i]
                    a2 += x0[i] * w2[i]
                _add_three(out[pair_token[r]], n, pair_weight[r], a0, a1, a2)
        for n in range(num_outputs // 3 * 3, num_outputs):
            w0 = matrix[n]
            for r in range(start, end):
                x0 = rows[r]
                a0 = np.float32(0)
                for i in range(width):
                    a0 += x0[i] * w0[i]
                out[pair_token[r], n] += pair_weight[r] * a0
        start = end


@_compiled(void(_vector, _vector, float32, _matrix, _matrices, _matrices, int64, _vector))
def _mix_one_token(
    x: Floats,
    norm: Floats,
    eps: np.float32,
    gate: Floats,
    gate_up_proj: Floats,
    down_proj: Floats,
    top_k: int,
    out: Floats,
) -> None:
    normalised, logits = np.empty(x.shape[0], np.float32), np.empty(gate.shape[0], np.float32)
    experts, weights = np.empty(top_k, np.int64), np.empty(top_k, np.float32)
    expert_dim = down_proj.shape[2]
    gate_up, part = np.empty(2 * expert_dim, np.float32), np.empty(x.shape[0], np.float32)
    _normalise(x, norm, eps, normalised)
    _multiply(gate, normalised, logits)
    _choose(logits, experts, weights)
    out[:] = np.float32(0)
    for place in range(top_k):
        _multiply(gate_up_proj[experts[place]], normalised, gate_up)
        for i in range(expert_dim):
            gated = gate_up[i] / (np.float32(1) + math.exp(-gate_up[i]))
            gate_up[i] = weights[place] * gated * gate_up[expert_dim + i]
        _multiply(down_proj[experts[place]], gate_up[:expert_dim], part)
        for i in range(out.shape[0]):
            out[i] += part[i]


@_compiled(
    void(_vector, _vector, float32, _matrix, _vector, _vector, _vector, _vector, _matrices, _matrices, int64, _matrix)
)
def _attend_one_token(
    x: Floats,
    norm: Floats,
    eps: np.float32,
    att_proj: Floats,
    q_norm: Floats,
    k_norm: Floats,
    cos: Floats,
    sin: Floats,
    keys: Floats,
    values: Floats,
    position: int,
    attn_out: Floats,
) -> None:
    num_kv_heads, _, head_dim = keys.shape
    query, key = q_norm.shape[0], k_norm.shape[0]
    num_heads = query // head_dim
    projected = np.empty(att_proj.shape[0], np.float32)
    normalised, heads = np.empty(max(query, key), np.float32), np.empty((num_heads, head_dim), np.float32)
    mixed, out = np.zeros(query, np.float32), np.empty(x.shape[0], np.float32)
    scores = np.empty(position + 1, np.float32)
    _normalise_and_multiply(x, norm, eps, att_proj, projected)
    _normalise(projected[query : query + key], k_norm, eps, normalised[:key])
    _rotate(normalised[:key], cos, sin, heads[:num_kv_heads])
    for head in range(num_kv_heads):
        start = query + key + head * head_dim
        keys[head, position, :] = heads[head]
        values[head, position, :] = projected[start : start + head_dim]
    _normalise(projected[:query], q_norm, eps, normalised[:query])
    _rotate(normalised[:query], cos, sin, heads)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        _multiply(keys[kv_head, : position + 1], heads[head], scores)
        highest = scores.max()
        total = np.float32(0)
        for place in range(position + 1):
            scores[place] = math.exp(scale * (scores[place] - highest))
        for place in range(position + 1):
            total += scores[place]
        start = head * head_dim
        for place in range(position + 1):
            share = scores[place] / total
            for i in range(head_dim):
                mixed[start + i] += share * values[kv_head, place, i]
    _multiply(attn_out, mixed, out)
    for i in range(x.shape[0]):
        x[i] += out[i]


@_compiled(void(int64[::1], _matrix, _matrix, _matrix, int64[::1], _matrix))
def _embed(
    ids: NDArray[np.int64],
    embedding: Floats,
    new_embedding: Floats,
    features: Floats,
    places: NDArray[np.int64],
    out: Floats,
) -> None:
    size = embedding.shape[0]
    for token in range(ids.shape[0]):
        index = ids[token]
        out[token, :] = embedding[index] if index < size else new_embedding[index - size]
    for cell in range(places.shape[0]):
        place = places[cell]
        if place >= 0:
            for i in range(out.shape[1]):
                out[place, i] += features[cell, i]


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
    _embed(ids.contiguous().numpy(), embedding, new_embedding, cells, flat_places, out)
    return torch.from_numpy(out)


def rms_norm(x: Tensor, weight: Floats, eps: np.float32) -> Tensor:
    """See `pacevlm.models.molmoe.blocks.rms_norm`; any shape `(..., width)`."""
    out = np.empty(x.shape, np.float32)
    width = x.shape[-1]
    _normalise_rows(as_floats(x).reshape(-1, width), weight, eps, out.reshape(-1, width))
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
    _normalise_and_rotate(rows, q_norm, k_norm, eps, cos.reshape(-1, head_dim), sin.reshape(-1, head_dim), out)
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
    _attend_one_token(x, norm, eps, att_proj, q_norm, k_norm, *rope, *cache, position, attn_out)


def mix_one_token(
    x: Floats, norm: Floats, eps: np.float32, gate: Floats, gate_up_proj: Floats, down_proj: Floats, top_k: int
) -> Floats:
    """Norm, router and experts of one token, `(d_model,)` to the same shape."""
    out = np.empty_like(x)
    _mix_one_token(x, norm, eps, gate, gate_up_proj, down_proj, top_k, out)
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
    _group(logits, counts, pair_token, pair_weight, ends)
    return torch.from_numpy(pair_token), torch.from_numpy(pair_weight), torch.from_numpy(ends)


def weighted_sum(rows: Tensor, pair_token: Tensor, pair_weight: Tensor, num_tokens: int) -> Tensor:
    """Add the weighted outputs of pairs `(pairs, d_model)` up for each token, `(tokens, d_model)`."""
    out = np.empty((num_tokens, rows.shape[1]), np.float32)
    _scatter(as_floats(rows), pair_token.numpy(), pair_weight.numpy(), out)
    return torch.from_numpy(out)


def multiply_few_rows(
    rows: Tensor, ends: Tensor, weight: Floats, pair_token: Tensor, pair_weight: Tensor, num_tokens: int
) -> Tensor:
    """`weighted_sum` of the products of `pacevlm.models.molmoe.experts.grouped_product`, where experts have few rows.

    A library's product of a dozen rows takes longer to set up than to compute: for 16 experts with 16 rows of 128 by 96
    it takes twice as long as this (docs/log.md).
    """
    out = np.empty((num_tokens, weight.shape[1]), np.float32)
    _multiply_and_scatter(as_floats(rows), ends.numpy(), weight, pair_token.numpy(), pair_weight.numpy(), out)
    return torch.from_numpy(out)
