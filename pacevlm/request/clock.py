"""The clock of one request: device-synchronised wall-clock end to end, and the times of its stages in between."""

from __future__ import annotations

import itertools
import time
from typing import Literal, get_args

import torch

from pacevlm.types import StageTimes

Stage = Literal["read_ms", "prepare_ms", "stage1_ms", "vision_ms", "first_block_ms", "prefill_ms", "decode_ms"]


class StageClock:
    """Times the stages of one request; starts when it is made.

    On a CPU a mark is a reading of the wall clock. Elsewhere it is an event in the stream, so that marking never makes
    the host wait and stages are timed where they run; the device is synchronised at the start and at the end alone.
    Stages touch each other, so they add up to the whole but for what follows the last mark.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._module.synchronize(device)
        self._start = time.perf_counter()
        self._stages: list[Stage] = []
        self._times: list[float] = []
        self._events: list[torch.Event] = []
        self._record()

    def mark(self, stage: Stage) -> None:
        """End a stage here, and begin the next; a stage may come several times."""
        self._stages.append(stage)
        self._record()

    def _record(self) -> None:
        if self.device.type != "cpu":
            event = self._module.Event(enable_timing=True)
            event.record(self._module.current_stream(self.device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def finish(self) -> StageTimes:
        """Milliseconds of every stage, 0 for one that never came, and of the whole request until now."""
        self._module.synchronize(self.device)
        e2e_ms = (time.perf_counter() - self._start) * 1e3
        if self._events:
            spans_ms = [first.elapsed_time(second) for first, second in itertools.pairwise(self._events)]
        else:
            spans_ms = [(second - first) * 1e3 for first, second in itertools.pairwise(self._times)]
        spans = list(zip(self._stages, spans_ms, strict=True))
        total_ms = {name: sum(ms for stage, ms in spans if stage == name) for name in get_args(Stage)[:-1]}
        decode_ms = tuple(ms for stage, ms in spans if stage == "decode_ms")
        return StageTimes(**total_ms, decode_ms=decode_ms, e2e_ms=e2e_ms)
