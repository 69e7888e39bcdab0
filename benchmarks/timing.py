"""Several ways of doing one thing, timed in turns, so that a slow moment of the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from pacevlm.evaluation.statistics import Interval, ratio_interval, resampled_means
from pacevlm.latency.measuring import without_garbage_collection


class Interleaved:
    """Runs every way on every input, the ways in a new random order each time.

    Args:
        ways: name to function of one input.
        synchronise: waits until the device has finished.

    Attributes:
        times_ms: for every way one time per (repeat, input), in that order.
        all_results: what the ways returned, in the same order.
    """

    def __init__(self, ways: Mapping[str, Callable[[Any], Any]], synchronise: Callable[[], None]) -> None:
        self.ways, self.synchronise = dict(ways), synchronise
        self.times_ms: dict[str, list[float]] = {name: [] for name in ways}
        self.all_results: dict[str, list[Any]] = {name: [] for name in ways}
        self._num_inputs = 0

    def run(
        self, inputs: Sequence[Any], repeats: int, progress: Progress | None, what: str, num_warmup: int = 3
    ) -> None:
        """Time all; the first inputs run once before, untimed."""
        self._num_inputs = len(inputs)
        for value in inputs[:num_warmup]:
            for way in self.ways.values():
                way(value)
        rng = np.random.default_rng(0)
        task = None if progress is None else progress.add_task(what, total=repeats * len(inputs))
        names = list(self.ways)
        for _ in range(repeats):
            for value in inputs:
                with without_garbage_collection():
                    for place in rng.permutation(len(names)):
                        name = names[place]
                        self.synchronise()
                        started = time.perf_counter()
                        result = self.ways[name](value)
                        self.synchronise()
                        self.times_ms[name].append((time.perf_counter() - started) * 1e3)
                        self.all_results[name].append(result)
                if progress is not None and task is not None:
                    progress.advance(task)

    @property
    def last_results(self) -> dict[str, list[Any]]:
        """What every way returned on each input, in the last repeat."""
        return {name: results[-self._num_inputs :] for name, results in self.all_results.items()}

    def per_input_ms(self, name: str) -> np.ndarray:
        """Median over the repeats, `(inputs,)`."""
        return np.median(np.reshape(self.times_ms[name], (-1, self._num_inputs)), axis=0)

    def p50_ms(self, name: str) -> float:
        """Median over everything."""
        return float(np.median(self.times_ms[name]))


def bootstrap_ratio(timed: Interleaved, name: str, base: str) -> Interval:
    """Total time of one way over that of another on the same inputs, with a 95 % interval over the inputs."""
    both = np.stack([timed.per_input_ms(name), timed.per_input_ms(base)], axis=1)
    interval = ratio_interval(both.mean(axis=0), resampled_means(both))
    assert interval is not None  # times are positive
    return interval
