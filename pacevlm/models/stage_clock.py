"""The clock of one request: device-synchronised wall-clock end to end, and the spans of its stages in between."""

from __future__ import annotations

import itertools
import time

import torch


class StageClock:
    """Times consecutive stages of one request; starts when it is made.

    On a CPU a mark is a reading of the wall clock. Elsewhere it is an event in the stream, so that marking never makes
    the host wait and stages are timed where they run; the device is synchronised at the start and at the end alone.
    Spans touch each other, so they add up to the whole but for what follows the last mark.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._times: list[float] = []
        self._module = torch.get_device_module(device)
        self._events: list[torch.Event] = []
        self._module.synchronize(device)
        self._start = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        """End a stage here, and begin the next."""
        if self.device.type != "cpu":
            event = self._module.Event(enable_timing=True)
            event.record(self._module.current_stream(self.device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def finish(self) -> tuple[list[float], float]:
        """Milliseconds of every stage between two marks, and of the whole request until now."""
        self._module.synchronize(self.device)
        e2e_ms = (time.perf_counter() - self._start) * 1e3
        if self._events:
            return [first.elapsed_time(second) for first, second in itertools.pairwise(self._events)], e2e_ms
        return [(second - first) * 1e3 for first, second in itertools.pairwise(self._times)], e2e_ms
