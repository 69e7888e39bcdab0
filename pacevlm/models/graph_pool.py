"""CUDA graphs that share one pool of memory, because only one of them runs at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

# Runs before a graph is captured: libraries set themselves up on their first call, which no graph may hold.
NUM_WARMUP = 3

T = TypeVar("T")


class GraphPool:
    """Captures graphs; what they compute between their buffers lies in memory that they share.

    Args:
        device: a CUDA device, or another one, where nothing can be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None

    def capture(self, run: Callable[[], T], num_warmup: int = NUM_WARMUP) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of what `run` launches, and what it returned, which every replay writes over."""
        # Not `torch.cuda.graph`, which gives all free memory back to the device every time: there are many graphs.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            for _ in range(num_warmup):
                run()
            torch.cuda.synchronize(self.device)
            graph.capture_begin(pool=self._pool)
            try:
                result = run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        self._pool = graph.pool()
        return graph, result
