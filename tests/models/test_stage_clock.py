"""The clock of a request: spans touch each other and add up to the whole."""

from __future__ import annotations

import time

import pytest
import torch

from pacevlm.models.stage_clock import StageClock


def test_spans_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StageClock(torch.device("cpu"))
    for seconds in (0.5, 0.25, 2.0):
        now[0] += seconds
        clock.mark()
    now[0] += 0.125
    spans_ms, e2e_ms = clock.finish()
    assert spans_ms == [500.0, 250.0, 2000.0]
    assert e2e_ms == 2875.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_the_device_and_not_the_host() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    x @ x  # the first product loads a library
    clock = StageClock(device)
    for _ in range(20):
        x @ x
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    spans_ms, e2e_ms = clock.finish()
    assert len(spans_ms) == 2
    assert spans_ms[0] > 1.0  # 20 products of 137 GFLOP; the host only queued them
    assert sum(spans_ms) == pytest.approx(e2e_ms, rel=0.02)
