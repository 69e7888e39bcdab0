"""What the hardware can do at most, measured on it, and what a request asks of it at least."""

from __future__ import annotations

import time

import numpy as np
import torch

from pacevlm.knobs import Knobs
from pacevlm.models.elastic import ElasticModel


def _best_seconds(work: object, model: ElasticModel, repeats: int = 15) -> float:
    assert callable(work)
    seconds = []
    for _ in range(repeats):
        model.synchronise()
        started = time.perf_counter()
        work()
        model.synchronise()
        seconds.append(time.perf_counter() - started)
    return float(np.min(seconds))


def measure_bandwidth(model: ElasticModel, num_bytes: int = 256 << 20) -> float:
    """Bytes per second that a matrix-vector product reads: the best of several products too large for any cache."""
    width = 4096
    rows = num_bytes // width // torch.empty(0, dtype=model.dtype).element_size()
    matrix = torch.ones(rows, width, dtype=model.dtype, device=model.device)
    vector = torch.ones(width, dtype=model.dtype, device=model.device)
    return matrix.numel() * matrix.element_size() / _best_seconds(lambda: matrix @ vector, model)


def measure_flops(model: ElasticModel, size: int = 0) -> float:
    """Floating-point operations per second of a large square matrix product: the best of several."""
    side = size or (1024 if model.device.type == "cpu" else 8192)
    left = torch.ones(side, side, dtype=model.dtype, device=model.device)
    right = torch.ones(side, side, dtype=model.dtype, device=model.device)
    return 2 * side**3 / _best_seconds(lambda: left @ right, model)


def _block_sizes(model: ElasticModel) -> tuple[int, int, int]:
    """Weights of a block outside its experts, of one expert, and key-value numbers per token and block."""
    block = model.adapter.model.model.transformer.blocks[0]
    experts = sum(weight.numel() for weight in block.mlp.experts.parameters())
    everything = sum(weight.numel() for weight in block.parameters())
    return everything - experts, experts // model.adapter.num_experts, sum(block.attn.splits[1:])


def _passes(model: ElasticModel, knobs: Knobs) -> int:
    """Experts that a token passes through in all blocks."""
    later = knobs.num_blocks - model.stage2_after
    return model.stage2_after * model.trained_top_k + later * knobs.top_k


def decode_bytes(model: ElasticModel, knobs: Knobs, context: float) -> float:
    """Bytes that a decode step must read: the active experts' weights, those of all else that runs, and the cache."""
    outside, expert, kv = _block_sizes(model)
    head = model.adapter.model.lm_head.weight.numel()
    numbers = knobs.num_blocks * (outside + kv * context) + _passes(model, knobs) * expert + head
    return numbers * torch.empty(0, dtype=model.dtype).element_size()


def prefill_flops(model: ElasticModel, knobs: Knobs, tokens: float) -> float:
    """Operations that a prefill must do: two per weight and token, and the causal half of the attention products.

    Of the last block only the keys and values of all tokens count; the rest of it runs for one token.
    """
    outside, expert, kv = _block_sizes(model)
    attention = 2 * model.d_model * tokens**2
    whole_blocks = (knobs.num_blocks - 1) * (2 * outside * tokens + attention)
    experts = (_passes(model, knobs) - knobs.top_k) * 2 * expert * tokens
    return whole_blocks + experts + 2 * kv * model.d_model * tokens
