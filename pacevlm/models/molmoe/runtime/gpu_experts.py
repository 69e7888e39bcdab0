"""Triton kernels of a mixture of experts for many tokens.

Pairs of a token and one of its experts are sorted by expert; then two products and a sum. Rows are read by index, the
gates are applied before anything is written, and each token's rows are added in order, the same way every time. None of
it is differentiable, and nothing comes back to the host, so that a CUDA graph can hold it.

Method: tiles of one expert's rows each, as MegaBlocks (Gale et al. 2023) and vLLM have them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program multiplies at once: `rows` of one expert by `cols` of its outputs, `depth` of its inputs a step.

    Attributes:
        tail: rows of an expert's last tile where no more are left.
    """

    rows: int
    tail: int
    cols: int
    depth: int
    warps: int
    stages: int


# Tiles of the first and the second product, by the most rows that an expert has on average.
TILES = (
    (12, Tile(16, 16, 64, 128, 4, 4), Tile(16, 16, 128, 128, 4, 4)),
    (28, Tile(32, 32, 64, 128, 4, 4), Tile(32, 32, 128, 128, 4, 4)),
    (60, Tile(64, 64, 128, 64, 4, 4), Tile(64, 64, 128, 64, 4, 4)),
    (float("inf"), Tile(128, 64, 128, 64, 8, 4), Tile(128, 64, 256, 64, 8, 4)),
)
# Pairs that are looked at at once where they are sorted.
SORT_BLOCK = 2048


# No kernel is compiled anew for numbers of tokens that are 1 or divisible by 16, as Triton would do in a request.
@triton.jit(do_not_specialize=["num_pairs"])
def _sort_pairs(experts_ptr, order_ptr, ends_ptr, num_pairs, BLOCK: tl.constexpr):
    expert, cols = tl.program_id(0), tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        before += (tl.load(experts_ptr + start + cols, start + cols < num_pairs, expert) < expert).to(tl.int32)
    end = tl.sum(before)
    for start in range(0, num_pairs, BLOCK):
        mine = (tl.load(experts_ptr + start + cols, start + cols < num_pairs, -1) == expert).to(tl.int32)
        tl.store(order_ptr + end + tl.cumsum(mine) - 1, start + cols, mine > 0)
        end += tl.sum(mine)
    tl.store(ends_ptr + expert, end)


@triton.jit
def _load(pointers, start, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    if WIDTH % DEPTH == 0:
        return tl.load(pointers + start)
    return tl.load(pointers + start, (tl.arange(0, DEPTH) < WIDTH - start)[None, :], 0.0)


@triton.jit
def _multiply_tile(
    x_ptr, order_ptr, matrix_ptr, out_ptr, top_k, expert, start, end, first_col,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    places, inside = start + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    real = places < end
    pairs = tl.load(order_ptr + places, real, 0)
    # The first product reads tokens' rows and writes sorted ones, the second writes them back in the order of pairs.
    sources = pairs // top_k if GATED else tl.where(real, places, start)
    x = x_ptr + sources.to(tl.int64)[:, None] * WIDTH + inside[None, :]
    cols = first_col + tl.arange(0, COLS)
    matrix_rows = expert.to(tl.int64) * (2 * HEIGHT if GATED else HEIGHT) + tl.minimum(cols, HEIGHT - 1)
    matrix = matrix_ptr + matrix_rows[:, None] * WIDTH + inside[None, :]
    total, up = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for depth in range(0, WIDTH, DEPTH):
        part = _load(x, depth, WIDTH, DEPTH)
        weight = _load(matrix, depth, WIDTH, DEPTH)
        total = tl.dot(part, weight.T, total, input_precision="ieee")
        if GATED:
            weight = _load(matrix + HEIGHT * WIDTH, depth, WIDTH, DEPTH)
            up = tl.dot(part, weight.T, up, input_precision="ieee")
    if GATED:
        total = total * tl.sigmoid(total) * up
    targets = places if GATED else pairs
    out = out_ptr + targets.to(tl.int64)[:, None] * HEIGHT + cols[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), real[:, None] & (cols < HEIGHT)[None, :])


@triton.jit(do_not_specialize=["top_k"])
def _multiply_experts(
    x_ptr, order_ptr, ends_ptr, matrix_ptr, out_ptr, top_k,
    EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Tiles of the same rows run side by side, and of the same expert near each other: both are read from memory once.
    num_cols: tl.constexpr = (HEIGHT + COLS - 1) // COLS
    tile, first_col = tl.program_id(0) // num_cols, tl.program_id(0) % num_cols * COLS
    experts = tl.arange(0, BLOCK)
    starts = tl.load(ends_ptr + experts - 1, (experts > 0) & (experts < EXPERTS), 0)
    ends = tl.load(ends_ptr + experts, experts < EXPERTS, 0)
    tiles = tl.where(experts < EXPERTS, (ends - starts + ROWS - 1) // ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if expert >= EXPERTS:
        return
    end = tl.sum(tl.where(experts == expert, ends, 0))
    start = tl.sum(tl.where(experts == expert, starts, 0))
    start += (tile - tl.sum(tl.where(experts < expert, tiles, 0))) * ROWS
    if TAIL < ROWS and end - start <= TAIL:
        _multiply_tile(
            x_ptr, order_ptr, matrix_ptr, out_ptr, top_k, expert, start, end, first_col,
            HEIGHT, WIDTH, GATED, TAIL, COLS, DEPTH,
        )  # fmt: skip
    else:
        _multiply_tile(
            x_ptr, order_ptr, matrix_ptr, out_ptr, top_k, expert, start, end, first_col,
            HEIGHT, WIDTH, GATED, ROWS, COLS, DEPTH,
        )  # fmt: skip


@triton.jit
def _sum_experts(
    rows_ptr, weights_ptr, experts_ptr, residual_ptr, out_ptr,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        # Nothing was written for experts that do not run.
        mask = (cols < WIDTH) & (tl.load(experts_ptr + pair) < EXPERTS)
        total += tl.load(rows_ptr + pair * WIDTH + cols, mask, 0.0) * tl.load(weights_ptr + pair).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    residual = tl.load(residual_ptr + token * WIDTH + cols, cols < WIDTH, 0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + cols, residual + total.to(dtype).to(tl.float32), cols < WIDTH)


def _multiply(
    x: Tensor, order: Tensor, ends: Tensor, weight: Tensor, out: Tensor, top_k: int, is_gated: bool, tile: Tile
) -> None:
    num_experts, rows, width = weight.shape
    height = rows // 2 if is_gated else rows
    # As many as there can be: whole tiles, and one that is not for each expert. Which ones there are a program finds.
    num_tiles = min(len(order), len(order) // tile.rows + num_experts)
    _multiply_experts[(num_tiles * triton.cdiv(height, tile.cols),)](
        x, order, ends, weight, out, top_k, num_experts, height, width, is_gated,
        tile.rows, tile.tail, tile.cols, tile.depth, triton.next_power_of_2(num_experts),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def add_experts(
    residual: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    keep: Tensor | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """`run_experts` of `pacevlm.models.experts`, added to the residual stream; for bfloat16 and float16.

    Args:
        residual: what is added to, shaped as x; it may be written over.
        tiles: of the two products; those of `TILES` for the number of tokens if None.
    """
    num_experts, width, inner_width = down_proj.shape
    num_tokens, top_k = experts.shape
    num_pairs = num_tokens * top_k
    if keep is not None:
        experts = experts.masked_fill(~keep, num_experts)  # which is no expert's
    first, second = tiles or next(found for most, *found in TILES if num_pairs <= most * num_experts)
    order = torch.empty(num_pairs, dtype=torch.int32, device=x.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    _sort_pairs[(num_experts,)](experts, order, ends, num_pairs, SORT_BLOCK, num_warps=8)
    inner = x.new_empty(num_pairs, inner_width)
    _multiply(x, order, ends, gate_up_proj, inner, top_k, True, first)
    rows = x.new_empty(num_pairs, width)
    _multiply(inner, order, ends, down_proj, rows, top_k, False, second)
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(width))
    _sum_experts[(num_tokens, triton.cdiv(width, block))](
        rows, weights, experts, residual, out, num_experts, width, top_k, block
    )
    return out
