"""An engine for fast tests of what is in front of it: it accepts and answers as told, and runs no model."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace

from pacevlm.errors import DeadlineError, PacevlmError
from pacevlm.images import open_picture
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.server.job import Job, Served
from pacevlm.types import Answer, RequestSizes, StageTimes, VisionSizes

PIECES = ("four", "ty ", "two")


class StandInEngine:
    """Answers every job after `seconds`, unless `error` says otherwise; `jobs` are those it was given."""

    outlook = SimpleNamespace(
        knob_space=KnobSpace(),
        full_p50_ms=20.0,
        default_budget_ms=80.0,
        default_price=0.0,
        is_embedded=True,
        max_positions=256,
    )

    def __init__(self) -> None:
        self.ready = False
        self.seconds = 0.0
        self.error: PacevlmError | None = None  # of submit
        self.late_error: PacevlmError | None = None  # behind the first piece
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.served = 0

    async def start(self) -> None:
        self.ready = True

    async def stop(self) -> None:
        self.ready = False

    def submit(self, job: Job) -> StandInTicket:
        if self.error is not None:
            raise self.error
        if job.image is not None:
            open_picture(job.image)
        if job.knobs is not None:
            self.outlook.knob_space.index(job.knobs)
        self.jobs.append(job)
        return StandInTicket(self, job)

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(waiting=0, running=0, accepted=len(self.jobs), expired=0, restarts=0, drift_factor=1.0)


class StandInTicket:
    def __init__(self, engine: StandInEngine, job: Job) -> None:
        self._engine, self._job, self._done = engine, job, False
        self._is_cancelled = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[str | Served]:
        began_s = time.perf_counter()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_cancelled.wait(), self._engine.seconds)
        if self._is_cancelled.is_set():
            raise DeadlineError("the request was cancelled")
        if self._job.stream:
            for index, piece in enumerate(PIECES):
                if index == 1 and self._engine.late_error is not None:
                    raise self._engine.late_error
                yield piece
                await asyncio.sleep(0)
        elif self._engine.late_error is not None:
            raise self._engine.late_error
        self._done = True
        self._engine.served += 1
        yield self._serve(began_s)

    def cancel(self) -> None:
        self._is_cancelled.set()
        if not self._done:
            self._engine.cancelled.append(self._job.request_id)

    def _serve(self, began_s: float) -> Served:
        job, finished_s = self._job, time.perf_counter()
        kinds = list(job.budgets_ms)
        kind = "e2e" if "e2e" in kinds or not kinds else "ttft"
        waited_ms = (began_s - job.arrived_s) * 1e3
        vision = VisionSizes(1, 9)
        answer = Answer(
            answer="".join(PIECES),
            token_ids=(1, 2, 3),
            knobs=job.knobs or Knobs("low", 4, 12),
            sizes=RequestSizes((vision,), 7, 100),
            vision=vision,
            times=StageTimes(1, 1, 1, 1, 1, 1, (1.0, 1.0), (finished_s - began_s) * 1e3 + 8),
            budget_ms=job.budgets_ms.get(kind, 80.0 if job.knobs is None else math.inf),
            kind=kind,
            price=job.price or 0.0,
            predicted_ms=8.0,
            upper_bound_ms=9.0,
            waited_ms=waited_ms,
        )
        return Served(answer, waited_ms, finished_s, 1, "stop")
