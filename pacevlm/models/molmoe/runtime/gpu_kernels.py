"""Triton kernels for what a GPU would otherwise run as many small kernels, or as a product far too wide for one token.

A decode step of one request is bound by launches and by reading its weights once. Each function computes what torch
does in `blocks` and `experts`, which `pytest -m gpu` compares. None of them is differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a weight matrix that a program multiplies at once, and most columns: of the sizes tried on an H200 the best.
BLOCK_ROWS, MAX_BLOCK_COLS = 4, 2048
# Of fewer rows, a router's for example, each gets a program of its own.
FEW_ROWS = 512


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x = tl.load(x_ptr + row * WIDTH + cols, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    # Half precision rounds here, as the model was trained; the product is rounded when it is stored.
    x = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + cols, x * tl.load(weight_ptr + cols, mask, 0.0).to(tl.float32), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with float32 statistics; the weight multiplies after the cast back."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, width, triton.next_power_of_2(width))
    return out


@triton.jit
def _scale_of(x_ptr, eps, WIDTH: tl.constexpr, COLS: tl.constexpr):
    squares = tl.zeros((COLS,), tl.float32)
    for start in range(0, WIDTH, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(x_ptr + cols, cols < WIDTH, 0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / WIDTH + eps)


@triton.jit
def _normed(x_ptr, norm_ptr, scale, start, WIDTH: tl.constexpr, COLS: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = start + tl.arange(0, COLS)
    x = tl.load(x_ptr + cols, cols < WIDTH, 0.0).to(tl.float32)
    # Rounded where `_rms_norm` rounds.
    x = (x * scale).to(dtype).to(tl.float32) * tl.load(norm_ptr + cols, cols < WIDTH, 0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)[None, :]


@triton.jit
def _multiply_row(
    x_ptr, norm_ptr, matrix_ptr, residual_ptr, out_ptr, eps, NORMED: tl.constexpr, ADDED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = _scale_of(x_ptr, eps, WIDTH, COLS) if NORMED else 1.0
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, WIDTH, COLS):
        cols = start + tl.arange(0, COLS)
        mask = (rows < HEIGHT)[:, None] & (cols < WIDTH)[None, :]
        if NORMED:
            x = _normed(x_ptr, norm_ptr, scale, start, WIDTH, COLS)
        else:
            x = tl.load(x_ptr + cols, cols < WIDTH, 0.0).to(tl.float32)[None, :]
        total += tl.load(matrix_ptr + rows[:, None] * WIDTH + cols[None, :], mask, 0.0).to(tl.float32) * x
    out = tl.sum(total, 1).to(dtype)
    if ADDED:
        out = (out.to(tl.float32) + tl.load(residual_ptr + rows, rows < HEIGHT, 0.0).to(tl.float32)).to(dtype)
    tl.store(out_ptr + rows, out, rows < HEIGHT)


def multiply_row(
    x: Tensor, weight: Tensor, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None
) -> Tensor:
    """`F.linear` of a single row, `(..., width)` to `(..., height)`; the library's product is made for many.

    Args:
        norm: weight and eps of an RMS norm in front of the product.
        residual: `(..., height)`, added to what comes out.
    """
    height, width = weight.shape
    out = x.new_empty(*x.shape[:-1], height)
    rows = 1 if height < FEW_ROWS else BLOCK_ROWS
    cols = min(MAX_BLOCK_COLS, triton.next_power_of_2(width))
    norm_weight, eps = norm or (x, 0.0)
    _multiply_row[(triton.cdiv(height, rows),)](
        x.contiguous(), norm_weight, weight, x if residual is None else residual.contiguous(), out, eps,
        norm is not None, residual is not None, height, width, rows, cols,
    )  # fmt: skip
    return out


@triton.jit
def _route(logits_ptr, weights_ptr, experts_ptr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token, experts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token * EXPERTS + experts, experts < EXPERTS, float("-inf")).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits))
    shares = shares / tl.sum(shares)
    for place in range(TOP_K):
        best = tl.argmax(shares, 0)
        tl.store(weights_ptr + token * TOP_K + place, tl.max(shares).to(weights_ptr.dtype.element_ty))
        tl.store(experts_ptr + token * TOP_K + place, best.to(tl.int64))
        shares = tl.where(experts == best, -1.0, shares)


def route(router_logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `pacevlm.models.experts.route`."""
    router_logits = router_logits.contiguous()
    num_tokens, num_experts = router_logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=dtype, device=router_logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=router_logits.device)
    _route[(num_tokens,)](router_logits, weights, experts, num_experts, top_k, triton.next_power_of_2(num_experts))
    return weights, experts


@triton.jit
def _gate_up(
    x_ptr, norm_ptr, weights_ptr, experts_ptr, matrix_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    place, rows = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = matrix_ptr + tl.load(experts_ptr + place) * (2 * INNER * WIDTH) + rows[:, None] * WIDTH
    gate, up = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    scale = _scale_of(x_ptr, eps, WIDTH, COLS)
    for start in range(0, WIDTH, COLS):
        cols = start + tl.arange(0, COLS)
        mask = (rows < INNER)[:, None] & (cols < WIDTH)[None, :]
        x = _normed(x_ptr, norm_ptr, scale, start, WIDTH, COLS)
        gate += tl.load(matrix + cols[None, :], mask, 0.0).to(tl.float32) * x
        up += tl.load(matrix + INNER * WIDTH + cols[None, :], mask, 0.0).to(tl.float32) * x
    gates = tl.sum(gate, 1)
    out = gates * tl.sigmoid(gates) * tl.sum(up, 1) * tl.load(weights_ptr + place).to(tl.float32)
    tl.store(out_ptr + place * INNER + rows, out, rows < INNER)


@triton.jit
def _down(
    inner_ptr, experts_ptr, matrix_ptr, residual_ptr, out_ptr,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for place in range(TOP_K):
        matrix = matrix_ptr + tl.load(experts_ptr + place) * (WIDTH * INNER) + rows[:, None] * INNER
        for start in range(0, INNER, COLS):
            cols = start + tl.arange(0, COLS)
            mask = (rows < WIDTH)[:, None] & (cols < INNER)[None, :]
            inner = tl.load(inner_ptr + place * INNER + cols, cols < INNER, 0.0)[None, :]
            total += tl.load(matrix + cols[None, :], mask, 0.0).to(tl.float32) * inner
    residual = tl.load(residual_ptr + rows, rows < WIDTH, 0.0).to(tl.float32)
    tl.store(out_ptr + rows, residual + tl.sum(total, 1).to(dtype).to(tl.float32), rows < WIDTH)


def add_experts_of_one_token(
    x: Tensor, norm: tuple[Tensor, float], weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The stream of one token, `(1, width)`, with its normed experts added; reads the active ones' weights alone.

    Args:
        norm: weight and eps of the RMS norm in front of the experts.
        weights, experts, gate_up_proj, down_proj: as `run_experts` of `pacevlm.models.experts` takes them.
    """
    _, width, inner_width = down_proj.shape
    x, top_k = x.contiguous(), experts.shape[1]
    inner = torch.empty(top_k, inner_width, dtype=torch.float32, device=x.device)
    cols = min(MAX_BLOCK_COLS, triton.next_power_of_2(width))
    grid = (top_k, triton.cdiv(inner_width, BLOCK_ROWS))
    _gate_up[grid](x, norm[0], weights, experts, gate_up_proj, inner, norm[1], width, inner_width, BLOCK_ROWS, cols)
    out = torch.empty_like(x)
    cols = min(MAX_BLOCK_COLS, triton.next_power_of_2(inner_width))
    _down[(triton.cdiv(width, BLOCK_ROWS),)](
        inner, experts, down_proj, x, out, top_k, width, inner_width, BLOCK_ROWS, cols
    )
    return out


# Not compiled anew for numbers of tokens that are 1 or even, as Triton would do in the middle of a request.
@triton.jit(do_not_specialize=["num_tokens", "capacity", "row_stride", "rope_stride"])
def _normalise_and_rotate(
    projected_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, places_ptr, q_ptr, k_ptr, v_ptr,
    eps, num_tokens, capacity, row_stride, rope_stride,
    INTO: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = row // num_tokens, row % num_tokens
    width = tl.where(part == 0, QUERY, KEY)
    cols = tl.arange(0, BLOCK)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    inside = cols % HEAD
    x_ptr = projected_ptr + row * row_stride + tl.where(part == 2, QUERY + KEY, part * QUERY)
    x = tl.load(x_ptr + cols, cols < width, 0.0).to(tl.float32)
    column = tl.load(places_ptr + token) if INTO else token
    cached = ((batch * (KEY // HEAD) + cols // HEAD) * capacity + column) * HEAD + inside
    if part == 2:
        tl.store(v_ptr + cached, x, cols < KEY)
        return
    of_query, of_key = (cols < width) & (part == 0), (cols < width) & (part == 1)
    partner = cols - inside + (inside + HEAD // 2) % HEAD
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    other = tl.load(x_ptr + partner, cols < width, 0.0).to(tl.float32)
    weight = tl.load(q_weight_ptr + cols, of_query, 0.0) + tl.load(k_weight_ptr + cols, of_key, 0.0)
    other_weight = tl.load(q_weight_ptr + partner, of_query, 0.0) + tl.load(k_weight_ptr + partner, of_key, 0.0)
    # Half precision rounds where the model was trained to: behind the norm, behind its weight, behind the rotation.
    x = ((x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)
    other = ((other * scale).to(dtype).to(tl.float32) * other_weight.to(tl.float32)).to(dtype).to(tl.float32)
    angle = batch * rope_stride + token * HEAD + inside
    rotated = x * tl.load(cos_ptr + angle) + other * tl.load(sin_ptr + angle)
    tl.store(q_ptr + row * QUERY + cols, rotated, of_query)
    tl.store(k_ptr + cached, rotated, of_key)


def normalise_and_rotate(
    projected: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    rope: tuple[Tensor, ...],
    head_dim: int,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a fused projection, normalised over all heads and rotated by half-split tables.

    Args:
        projected: `(batch, tokens, query + key + value)`.
        rope: cosines and sines, each `(batch or 1, 1, tokens, head_dim)` float32.
        into: keys and values of a cache, `(batch, heads, capacity, head_dim)`, and the tokens' places in it,
            `(tokens,)`, where keys and values are written.

    Returns:
        queries, `(batch, heads, tokens, head_dim)`, and keys of the same shape, or those of the cache.
    """
    projected = projected.contiguous()
    batch, num_tokens, row_stride = projected.shape
    cos, sin = (table.contiguous() for table in rope)
    query, key = q_norm.shape[0], k_norm.shape[0]
    # Token by token in memory: attention's output is laid out likewise, as the next product reads it.
    q = projected.new_empty(batch, num_tokens, query // head_dim, head_dim).transpose(1, 2)
    if into is None:
        k = projected.new_empty(batch, key // head_dim, num_tokens, head_dim)
        into, parts = (k, k, q), 2
    else:
        parts = 3
    keys, values, places = into
    rope_stride = cos.stride(0) if cos.shape[0] > 1 else 0
    block = triton.next_power_of_2(max(query, key))
    _normalise_and_rotate[(batch * num_tokens, parts)](
        projected, q_norm, k_norm, cos, sin, places, q, keys, values,
        eps, num_tokens, keys.shape[2], row_stride, rope_stride, parts == 3, query, key, head_dim, block,
    )  # fmt: skip
    return q, keys
