"""The clock of a request: spans touch each other and add up to the whole."""

from __future__ import annotations

import time

import pytest
import torch

from pacevlm.request.clock import StageClock
from pacevlm.types import StageTimes


def test_spans_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StageClock(torch.device("cpu"))
    stages = ("read_ms", "prepare_ms", "stage1_ms", "prepare_ms", "prefill_ms", "decode_ms", "decode_ms")
    for seconds, stage in zip((0.5, 0.25, 2.0, 0.5, 4.0, 1.0, 1.5), stages, strict=True):
        now[0] += seconds
        clock.mark(stage)
    now[0] += 0.125
    # A stage that comes twice is summed, one that never comes takes nothing.
    assert clock.finish() == StageTimes(500.0, 750.0, 2000.0, 0.0, 0.0, 4000.0, (1000.0, 1500.0), 9875.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_the_device_and_not_the_host() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    x @ x  # the first product loads a library
    clock = StageClock(device)
    for _ in range(20):
        x @ x
    clock.mark("vision_ms")
    time.sleep(0.02)
    clock.mark("first_block_ms")
    times = clock.finish()
    assert times.vision_ms > 1.0  # 20 products of 137 GFLOP; the host only queued them
    assert times.vision_ms + times.first_block_ms == pytest.approx(times.e2e_ms, rel=0.02)
