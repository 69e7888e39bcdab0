"""The blocks of one prompt with fixed shapes and addresses, which CUDA graphs can replay.

Launching a prompt's kernels one by one takes a GPU longer than running them, if the prompt is short. Here the stream
lies in a buffer, its length is rounded up, and each block is a graph of its own, whichever blocks a request keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pacevlm.models.adapter import Adapter, Rope
from pacevlm.models.graph_pool import NUM_WARMUP, GraphPool

# Lengths are multiples of it.
LENGTH_STEP = 64


class GraphPrefill:
    """A prompt's blocks behind stage 2; on a CUDA device a graph for each (block, top_k, length), made when first used.

    On other devices the same runs without a graph: there it is for tests.

    Args:
        adapter: the model.
        cache: buffers of a block's keys and values, `(1, heads, max_positions, head_dim)`.
        max_positions: tokens that they hold.
        pool: what captures graphs.

    Attributes:
        lengths: what numbers of tokens are rounded up to; none if the adapter has blocks that a graph cannot hold.
    """

    def __init__(
        self,
        adapter: Adapter[Any, Any],
        cache: Callable[[int], tuple[Tensor, Tensor]],
        max_positions: int,
        pool: GraphPool,
    ) -> None:
        self.adapter, self.cache, self._pool = adapter, cache, pool
        fits = not adapter.windows and not adapter.position_axes
        longest = min(adapter.max_graph_tokens, max_positions) if fits else 0
        self.lengths = tuple(min(end + LENGTH_STEP, longest) for end in range(0, longest, LENGTH_STEP))
        self._x = torch.zeros(1, longest, adapter.d_model, dtype=adapter.dtype, device=adapter.device)
        self._places = torch.arange(longest, device=adapter.device)
        self._ropes: dict[int, Rope] = {}
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def takes(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens can run here."""
        return num_tokens <= len(self._places)

    # Not inference mode, even inside it: see `GraphDecode`.
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, hidden: Tensor, blocks: Sequence[int], top_k: int) -> Tensor:
        """Logits behind a prompt, `(1, vocabulary)`; keys and values of the blocks stay in their buffers.

        Args:
            hidden: the stream in front of the blocks, `(tokens, d_model)`.
            blocks: which of those behind stage 2 run, in order.
        """
        if not blocks:
            return self.adapter.logits(hidden[-1:])
        num_tokens = len(hidden)
        length = next(length for length in self.lengths if length >= num_tokens)
        # Padding stands behind every real token, so causal attention already hides it from them.
        self._x[0, :num_tokens] = hidden
        self._x[0, num_tokens:length] = 0
        for block in blocks[:-1]:
            if self.adapter.device.type == "cuda":
                self._graph(block, top_k, length).replay()
            else:
                self._run(block, top_k, length)
        return self._finish(blocks[-1], top_k, length, num_tokens)

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture_all(self, blocks: Sequence[int], top_ks: Sequence[int]) -> None:
        """Capture the graphs of all lengths, and set up what runs behind them."""
        for length in self.lengths:
            for top_k in top_ks:
                for block in blocks:
                    self._graph(block, top_k, length)
                self._finish(blocks[-1], top_k, length, length)

    def _graph(self, block: int, top_k: int, length: int) -> torch.cuda.CUDAGraph:
        key = (block, top_k, length)
        if key not in self._graphs:
            self.cache(block)  # outside the pool
            is_first = not any(known[1:] == key[1:] for known in self._graphs)
            stream = self._x[:, :length].clone()  # which warming up changes
            self._graphs[key], _ = self._pool.capture(lambda: self._run(*key), NUM_WARMUP if is_first else 0)
            self._x[:, :length] = stream
        return self._graphs[key]

    def _rope(self, length: int) -> Rope:
        if length not in self._ropes:
            self._ropes[length] = self.adapter.rope(self._places[None, :length])
        return self._ropes[length]

    def _project(self, block: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.cache(block)
        x, places = self._x[:, :length], self._places[:length]
        q = self.adapter.project_into(block, x, self._rope(length), keys, values, places)
        return q, keys[:, :, :length], values[:, :, :length]

    def _run(self, block: int, top_k: int, length: int) -> None:
        x = self._x[:, :length]
        q, keys, values = self._project(block, length)
        mixed = self.adapter.add_attention(block, x, q, keys, values, None, is_causal=True)
        x.copy_(self.adapter.add_experts(block, mixed, top_k))

    def _finish(self, block: int, top_k: int, length: int, num_tokens: int) -> Tensor:
        # Behind the last block only the last token is read. Its kernels are launched while the others still run.
        q, keys, values = self._project(block, length)
        x, q = self._x[:, num_tokens - 1 : num_tokens], q[:, :, num_tokens - 1 : num_tokens]
        mask = x.new_zeros(1, 1, 1, length).masked_fill_(self._places[:length] >= num_tokens, float("-inf"))
        x = self.adapter.add_attention(block, x, q, keys, values, mask, is_causal=False)
        return self.adapter.logits(self.adapter.add_experts(block, x, top_k)[:, 0])
