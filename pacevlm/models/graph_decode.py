"""Decode steps of one request with fixed shapes and addresses, which a CUDA graph can replay.

In eager mode a decode step of one request is hundreds of small kernels, and a GPU waits for Python to launch each. A
graph launches them all at once, but holds only what does not change between steps. So keys and values live in buffers
of a fixed capacity, a mask hides what is not used yet, and the token and its position are read from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pacevlm.errors import ConfigError
from pacevlm.knobs import Compute
from pacevlm.models.adapter import Adapter, Rope
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.graph_pool import GraphPool
from pacevlm.models.graph_prefill import GraphPrefill

# The smallest capacity; the others are its doublings and what lies half way between. So a model of 32,768 positions has
# thirteen, all of which can be captured before the first request, and a third of a cache at most is read for nothing.
CAPACITY_STEP = 512


class GraphDecode:
    """Decode steps of one row; on a CUDA device one graph for each (top_k, num_blocks, capacity), made when first used.

    On other devices the same steps run without a graph, slower than the elastic loop: there they are for tests.

    Method: CUDA graphs over a static KV cache, as for example gpt-fast (PyTorch, 2023) and vLLM do.

    Args:
        adapter: the model.
        order: which blocks each num_blocks keeps.
        stage2_after: blocks that always run at the trained top_k.
        max_positions: most tokens of prompt and answer; the model's own limit if None.

    Attributes:
        capacities: all buffer lengths, shortest first.
        prefill: blocks of a prompt, whose keys and values go straight into the buffers.
    """

    def __init__(
        self, adapter: Adapter[Any, Any], order: BlockOrder, stage2_after: int, max_positions: int | None = None
    ) -> None:
        self.adapter, self.order, self.stage2_after = adapter, order, stage2_after
        self.max_positions = adapter.max_positions if max_positions is None else max_positions
        doubled = [CAPACITY_STEP << i for i in range(self.max_positions.bit_length())]
        lengths = sorted([*doubled, *(length * 3 // 2 for length in doubled)])
        self.capacities = (*(length for length in lengths if length < self.max_positions), self.max_positions)
        self._caches: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = GraphPool(adapter.device)
        self._token = torch.zeros(1, dtype=torch.long, device=adapter.device)
        self._place = torch.zeros(1, dtype=torch.long, device=adapter.device)
        self._position = torch.zeros(1, max(1, adapter.position_axes), dtype=torch.long, device=adapter.device)
        self.prefill = GraphPrefill(adapter, self.cache, self.max_positions, self._pool)

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs) + self.prefill.num_graphs

    def capacity(self, num_tokens: int) -> int:
        """Buffer length for so many tokens of prompt and answer; raises ConfigError if there are more than fit."""
        if num_tokens > self.max_positions:
            raise ConfigError(f"{num_tokens} tokens of prompt and answer exceed the {self.max_positions} that fit")
        return next(length for length in self.capacities if length >= num_tokens)

    def cache(self, block: int) -> tuple[Tensor, Tensor]:
        """Buffers of a block's keys and values, each `(1, heads, max_positions, head_dim)`."""
        if block not in self._caches:
            x = self.adapter.embed_tokens(self._token)[:, None]
            _, keys, values = self.adapter.project(block, x, self._rope())
            shapes = [(1, new.shape[1], self.max_positions, new.shape[3]) for new in (keys, values)]
            self._caches[block] = (keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]))
        return self._caches[block]

    # Not inference mode, even inside it: buffers are written to for as long as the model lives, in any mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Take over the prompt's keys and values of a block, each `(1, heads, tokens, head_dim)`."""
        for cache, new in zip(self.cache(block), (keys, values), strict=True):
            cache[:, :, : new.shape[2]] = new

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, token: Tensor, place: int, position: int, top_k: int, num_blocks: int, num_tokens: int) -> Tensor:
        """Logits of the next token, `(1, vocabulary)`; the next step overwrites them.

        Args:
            token: id that was generated last, `(1,)`.
            place: its place in prompt and answer, counted from 0.
            position: its rotary position, the same on all axes.
            num_tokens: most tokens that prompt and answer of this request may have.
        """
        self._token.copy_(token)
        self._place.fill_(place)
        self._position.fill_(position)
        capacity = self.capacity(num_tokens)
        if self.adapter.device.type != "cuda":
            return self._run(top_k, num_blocks, capacity)
        graph, logits = self._graph(top_k, num_blocks, capacity)
        graph.replay()
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture_all(self, computes: Sequence[Compute], num_tokens: int) -> None:
        """Capture all that requests with these choices of stage 2 and at most so many tokens will use.

        Where there are no graphs, on a CPU, this does nothing.
        """
        if self.adapter.device.type != "cuda":
            return
        longest = self.capacity(num_tokens)
        for capacity in (length for length in self.capacities if length <= longest):
            for top_k, num_blocks in computes:
                self._graph(top_k, num_blocks, capacity)
        blocks = {block for _, num_blocks in computes for block in self.order.kept(num_blocks)}
        blocks -= set(range(self.stage2_after))
        self.prefill.capture_all(sorted(blocks), sorted({top_k for top_k, _ in computes}))

    def _graph(self, top_k: int, num_blocks: int, capacity: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        key = (top_k, num_blocks, capacity)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _rope(self) -> Rope:
        """Rotary tables of the token."""
        return self.adapter.rope(self._position[:, None] if self.adapter.position_axes else self._position)

    def _run(self, top_k: int, num_blocks: int, capacity: int) -> Tensor:
        adapter = self.adapter
        x = adapter.embed_tokens(self._token)[:, None]
        rope = self._rope()
        # Added to scores rather than true or false, which attention would turn into this in every block.
        columns = torch.arange(capacity, device=x.device)
        mask = x.new_zeros(1, 1, 1, capacity).masked_fill_(columns > self._place, float("-inf"))
        masks: dict[int | None, Tensor] = {None: mask}
        for window in set(adapter.windows.values()):
            outside = columns <= self._place - window
            masks[window] = mask if window >= capacity else mask.masked_fill(outside, float("-inf"))
        for block in sorted(self.order.kept(num_blocks)):
            keys, values = self.cache(block)
            q = adapter.project_into(block, x, rope, keys, values, self._place)
            mask = masks[adapter.windows.get(block)]
            keys, values = keys[:, :, :capacity], values[:, :, :capacity]
            x = adapter.add_attention(block, x, q, keys, values, mask, is_causal=False)
            experts = adapter.trained_top_k if block < self.stage2_after else top_k
            x = adapter.add_experts(block, x, experts)
        return adapter.logits(x[:, 0])

    def _capture(self, top_k: int, num_blocks: int, capacity: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Every run writes the same keys to the same place, so that warming up changes nothing.
        return self._pool.capture(lambda: self._run(top_k, num_blocks, capacity))
