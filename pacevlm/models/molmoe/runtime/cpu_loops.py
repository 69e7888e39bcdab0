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
from numba import float32, int32, int64, void
from numpy.typing import NDArray

Floats = NDArray[np.float32]
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
def normalise_rows(x: Floats, weight: Floats, eps: np.float32, out: Floats) -> None:
    """RMS norm of every row of `x`."""
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
def normalise_and_rotate(
    projected: Floats, q_norm: Floats, k_norm: Floats, eps: np.float32, cos: Floats, sin: Floats, out: Floats
) -> None:
    """Norm and rotary embedding of queries and keys, `out` `(batch, heads, tokens, head_dim)`."""
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
def group(
    logits: Floats,
    top_k: NDArray[np.int64],
    pair_token: NDArray[np.int64],
    pair_weight: Floats,
    ends: NDArray[np.int32],
) -> None:
    """Sort (token, expert) pairs by expert, tokens in order, by counting."""
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
def scatter(rows: Floats, pair_token: NDArray[np.int64], pair_weight: Floats, out: Floats) -> None:
    """Add the weighted rows of pairs up for each token."""
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
def multiply_and_scatter(
    rows: Floats,
    ends: NDArray[np.int32],
    matrices: Floats,
    pair_token: NDArray[np.int64],
    pair_weight: Floats,
    out: Floats,
) -> None:
    """`scatter` of the products of rows with their own experts' matrices."""
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
def mix_one_token(
    x: Floats,
    norm: Floats,
    eps: np.float32,
    gate: Floats,
    gate_up_proj: Floats,
    down_proj: Floats,
    top_k: int,
    out: Floats,
) -> None:
    """Norm, router and experts of one token."""
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
def attend_one_token(
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
    """Attention of one new token, added to `x`; its key and value are written into the cache."""
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
def embed(
    ids: NDArray[np.int64],
    embedding: Floats,
    new_embedding: Floats,
    features: Floats,
    places: NDArray[np.int64],
    out: Floats,
) -> None:
    """Token embeddings, and features added at their places."""
    size = embedding.shape[0]
    for token in range(ids.shape[0]):
        index = ids[token]
        out[token, :] = embedding[index] if index < size else new_embedding[index - size]
    for cell in range(places.shape[0]):
        place = places[cell]
        if place >= 0:
            for i in range(out.shape[1]):
                out[place, i] += features[cell, i]
