"""The queue and its worker, from asyncio: everything that is accepted ends in an answer or an error."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pacevlm import errors
from pacevlm.errors import BudgetError, DeadlineError, OverloadError, PacevlmError, WorkerError
from pacevlm.server.config import ServeConfig
from pacevlm.server.job import Job, Served
from pacevlm.server.outlook import Look, Outlook
from pacevlm.server.schedule import NEWEST, Entry, Schedule, Turn
from pacevlm.server.ticket import Ticket
from pacevlm.server.wire import NO_IMAGE, answer_from_dict
from pacevlm.server.worker_process import WorkerProcess

log = logging.getLogger("pacevlm.server")

MAX_ATTEMPTS = 2
"""Workers that a request may begin on; one that kills so many is not tried again."""
HANG_S = 60.0
"""A worker that says nothing for so long beyond a request's bound is killed."""
MAX_RESTART_PAUSE_S = 30.0
SLOW_RETRY_S = 1.0
"""When to come again while the machine is slow, or no worker there for longer than was expected."""
FIRST_GAP_MS = 1.0
SHED_ABOVE = 0.5
"""While a larger share of the latest requests than this is refused, hopeless ones are not looked at."""
PROBE_ABOVE, PROBE_EVERY_S, MAX_PROBES = 1.2, 1.0, 60
"""A machine so many times slower than profiled is probed while nothing else is to be done: how often, and how many
times behind a request."""


@dataclass
class Stats:
    """Running counts since the start.

    Attributes:
        waiting, running: requests now.
        accepted: requests that got a place.
        refused: of those that did not, because of others or for want of time.
        answered, failed, expired, cancelled: how accepted ones ended.
        late: answered ones that did not keep their budget.
        restarts: workers that were started after one had died.
        drift_factor: how many times the profiled bounds those of now are.
        pace: how many times its prediction a request took lately.
        gap_ms: what passes between two requests.
    """

    waiting: int = 0
    running: int = 0
    accepted: int = 0
    refused: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    late: int = 0
    restarts: int = 0
    drift_factor: float = 1.0
    pace: float = 1.0
    gap_ms: float = FIRST_GAP_MS


class Engine:
    """A queue by deadlines in front of one worker process.

    All methods must be called in the event loop that `start` ran in.

    Args:
        config: what is served, and how.

    Attributes:
        outlook: the bundle without weights; there from `start` on.
        ready: whether a worker is there, warm.
    """

    outlook: Outlook

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.ready = False
        self.schedule = Schedule(config.max_waiting)
        self.schedule.gap_ms = FIRST_GAP_MS
        self._stats = Stats()
        self._tickets: dict[str, Ticket] = {}
        self._running: Ticket | None = None
        self._worker: WorkerProcess | None = None
        self._load_s = 10.0
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._wants_probe, self._num_probes = False, 0

    def stats(self) -> Stats:
        """Counts, as they are now."""
        stats, schedule = self._stats, self.schedule
        stats.waiting, stats.running = len(schedule.waiting), int(self._running is not None)
        stats.drift_factor, stats.pace, stats.gap_ms = schedule.factor, schedule.pace, schedule.gap_ms
        return stats

    # Life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the bundle, start a worker and wait until it is warm.

        Raises as `Pacer.from_pretrained` and `LookupTable.load` do, and WorkerError if the worker died.
        """
        import torch

        torch.set_num_threads(1)  # the front must not slow the worker down
        loading = asyncio.get_running_loop().run_in_executor(None, Outlook, self.config)
        worker = await WorkerProcess.start(self.config)  # loads at the same time
        try:
            self.outlook = await loading
        except BaseException:
            await worker.kill()
            raise
        await self._take(worker)
        self._loop_task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        """Accept nothing more, finish what was accepted, let the worker save its drift, and end it."""
        self._is_stopping = True
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
        self.ready = False
        if self._worker is not None:
            await self._worker.stop()

    def submit(self, job: Job) -> Ticket:
        """Accept a request at once, or refuse it at once.

        Raises:
            OverloadError: it could not be answered in time behind those that were accepted before it.
            BudgetError: no server of this kind could answer it in time, or a budget is no number in its range.
            DeadlineError: its budget is over.
            ImageError, QuestionError, KnobError, ConfigError: see `Outlook.look`.
            WorkerError: the server is stopping.
        """
        if self._is_stopping or self._loop_task is None or self._loop_task.done():
            raise WorkerError("the server is not running; try another one")
        if job.request_id in self._tickets:
            raise errors.ConfigError(f"a request {job.request_id!r} is being served already; give each its own id")
        if self.schedule.refused > SHED_ABOVE:
            self._shed(job, time.perf_counter())
        look = self.outlook.look(job)
        now_s = time.perf_counter()
        if not self.ready:  # a new worker may take longer than the last one did
            self.schedule.free_s = max(self.schedule.free_s, now_s + SLOW_RETRY_S)
        entry = Entry(
            job.request_id,
            job.arrived_s + look.whole_budget_ms / 1e3,
            *self._promised(float(look.predicted_ms[look.least]), float(look.bounds_ms["e2e"][look.least])),
            float(look.bounds_ms["e2e"][look.most]),
        )
        try:
            self._check_time(look, entry, now_s)
            refusal = self.schedule.admit(entry, now_s)
            if refusal is not None:
                retry_s = refusal.retry_s - now_s
                soonest_ms = self._budget_of(look, (refusal.soonest_s - job.arrived_s) * 1e3)
                raise OverloadError(
                    "this request could not be answered within its budget behind those accepted before it; "
                    f"try again in {max(retry_s, 0.01):.2f} s, or with a budget of {math.ceil(soonest_ms)} ms",
                    retry_s,
                    soonest_ms,
                )
        except (DeadlineError, BudgetError, OverloadError):
            self._stats.refused += 1
            raise
        self._stats.accepted += 1
        ticket = Ticket(self, job, look)
        self._tickets[job.request_id] = ticket
        ticket.timer = asyncio.get_running_loop().call_later(entry.deadline_s - now_s + 1e-3, self._expire)
        self._wake.set()
        return ticket

    def _shed(self, job: Job, now_s: float) -> None:
        """Refuse without a look, which takes a third of a request's work here, what is hopeless whatever it holds."""
        budget_ms = job.budgets_ms.get("e2e") if job.budgets_ms else self.outlook.default_budget_ms
        if job.image is None or budget_ms is None:
            return
        cheapest_ms, bound_ms = self._promised(*self.outlook.lightest_ms)
        entry = Entry(job.request_id, job.arrived_s + budget_ms / 1e3, cheapest_ms, bound_ms, bound_ms)
        refusal = self.schedule.admit(entry, now_s, is_lightest=True)
        if refusal is not None:
            self._stats.refused += 1
            retry_s = refusal.retry_s - now_s
            raise OverloadError(
                "no request could be answered within such a budget behind those accepted before it; "
                f"try again in {max(retry_s, 0.01):.2f} s",
                retry_s,
                math.inf,
            )

    def _promised(self, predicted_ms: float, bound_ms: float) -> tuple[float, float]:
        """What cheapest knobs are predicted to take, and what has to fit."""
        return predicted_ms, bound_ms if self.config.admission == "bounds" else predicted_ms

    def cancel(self, ticket: Ticket) -> None:
        """See `Ticket.cancel`."""
        if ticket.is_over:
            return
        self._stats.cancelled += 1
        if self.schedule.cancel(ticket.job.request_id):
            del self._tickets[ticket.job.request_id]
        ticket.finish(DeadlineError("the request was cancelled"))

    def _check_time(self, look: Look, entry: Entry, now_s: float) -> None:
        """Refuse what could not be answered in time even if nothing else were asked for."""
        whole_ms = entry.bound_ms * self.schedule.factor + self.schedule.gap_ms
        budget_ms, least_ms = look.budgets_ms[look.binding], self._budget_of(look, whole_ms)
        if now_s >= entry.deadline_s:
            raise DeadlineError(f"the budget was over {(now_s - entry.deadline_s) * 1e3:.0f} ms before the queue")
        if budget_ms < least_ms:
            if look.whole_budget_ms >= entry.bound_ms + FIRST_GAP_MS:
                if self._running is None:
                    self._probe()
                raise OverloadError(
                    "the machine is slower than profiled just now, and with its cheapest knobs this request may take "
                    f"{least_ms:.1f} ms; try again in {SLOW_RETRY_S:g} s, or with that budget",
                    SLOW_RETRY_S,
                    least_ms,
                )
            raise BudgetError(
                f"a budget of {budget_ms:g} ms is too small: with its cheapest knobs this request may take "
                f"{least_ms:.1f} ms here; give a larger one"
            )

    def _probe(self) -> None:
        """Let the worker find out whether the machine is still as slow as its last requests said."""
        self._wants_probe = True
        self._wake.set()

    @staticmethod
    def _budget_of(look: Look, whole_ms: float) -> float:
        """The tightest budget that was asked for, as it would have to be for the whole answer to take so long."""
        return whole_ms - look.behind_ms(look.binding)

    def _expire(self) -> None:
        for entry in self.schedule.expire(time.perf_counter()):
            ticket = self._tickets.pop(entry.key)
            self._stats.expired += 1
            ticket.finish(DeadlineError("the budget was over before the request could begin"))

    # The worker ------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        """Serve the queue until the engine stops; whatever else ends it, nobody waits for an answer in vain."""
        try:
            await self._serve_queue()
        except Exception:
            log.exception("a fault of the server itself; nothing is answered any more")
        finally:
            self.ready = False
            for ticket in self._tickets.values():
                ticket.finish(WorkerError("the server failed; try another one"))

    async def _serve_queue(self) -> None:
        """Until the engine stops and nothing is left of the queue."""
        while True:
            self._expire()
            turn = self.schedule.start(time.perf_counter())
            if turn is not None:
                await self._serve(turn)
            elif self._wants_probe:
                self._wants_probe = False
                await self._run_probe()
            elif self._is_stopping:
                return
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Until there is something to do; find out meanwhile whether a slow machine still is."""
        is_slow = max(self.schedule.factor, self.schedule.pace) > PROBE_ABOVE and self._num_probes < MAX_PROBES
        self._wake.clear()
        try:
            async with asyncio.timeout(PROBE_EVERY_S if is_slow else None):
                await self._wake.wait()
        except TimeoutError:
            self._wants_probe = True

    async def _serve(self, turn: Turn) -> None:
        ticket = self._tickets[turn.entry.key]
        ticket.attempts += 1
        self._running, self._num_probes = ticket, 0
        try:
            assert self._worker is not None
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + HANG_S + _bound_s(turn)):
                self._worker.send(_message(ticket, turn), ticket.job.image or NO_IMAGE)
                await self._follow(ticket)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            await self._replace_worker(turn, ticket)
        finally:
            self._running = None
        if ticket.is_over:
            self._tickets.pop(turn.entry.key, None)

    async def _follow(self, ticket: Ticket) -> None:
        """Hear of a running request until it is over."""
        assert self._worker is not None
        sent_s = time.perf_counter()
        while True:
            message = await self._worker.receive()
            if message["type"] == "choice":
                self.schedule.factor = message["drift_factor"]
                self.schedule.expect(message["end_s"])
            elif message["type"] == "token":
                if not ticket.is_over:
                    ticket.add_token(message["id"])
            else:
                break
        self.schedule.end(time.perf_counter())
        if message["type"] == "failed":
            self._stats.failed += 1
            ticket.finish(_error(message))
            return
        answer = answer_from_dict(message["answer"])
        served = Served(answer, message["queue_ms"], message["finished_s"], ticket.attempts, message["finish_reason"])
        if not ticket.is_over:
            self._stats.answered += 1
            self._stats.late += not answer.budget_met
        ticket.finish(served)
        self._learn(ticket, served, (time.perf_counter() - sent_s) * 1e3)

    def _learn(self, ticket: Ticket, served: Served, passed_ms: float) -> None:
        """Follow the machine: the usual pace, and what lies between two requests."""
        schedule, answer = self.schedule, served.answer
        predicted_ms = float(ticket.look.predicted_ms[self.outlook.knob_space.place(answer.knobs)])
        schedule.learn(predicted_ms, answer.times.e2e_ms)
        schedule.gap_ms += NEWEST * (max(passed_ms - answer.times.e2e_ms, 0.0) - schedule.gap_ms)

    async def _run_probe(self) -> None:
        assert self._worker is not None
        schedule = self.schedule
        self._num_probes += 1
        schedule.expect(time.perf_counter() + self.outlook.lightest_ms[0] * schedule.factor / 1e3)  # or a little more
        try:
            async with asyncio.timeout(HANG_S):
                self._worker.send({"type": "probe"})
                message = await self._worker.receive()
            schedule.factor = message["drift_factor"]
            schedule.learn(message["predicted_ms"], message["took_ms"])
            schedule.free_s = -math.inf
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            await self._replace_worker(None, None)

    async def _replace_worker(self, turn: Turn | None, ticket: Ticket | None) -> None:
        """Start another worker in the place of one that died, and give its request another try if that can be."""
        assert self._worker is not None
        self.ready = False
        self._running = None
        name = "a probe" if ticket is None else f"request {ticket.job.request_id}"
        log.error("the worker died while it ran %s", name)
        # Until there is another one, as if something ran that long.
        self.schedule.expect(time.perf_counter() + self._load_s)
        if turn is not None and ticket is not None and not ticket.is_over:
            if ticket.attempts >= MAX_ATTEMPTS:
                self._stats.failed += 1
                ticket.finish(WorkerError(f"{MAX_ATTEMPTS} workers died of this request; do not send it again"))
            else:
                self.schedule.readmit(turn.entry)
        await self._worker.kill()
        pause_s = 0.1
        while True:
            self._stats.restarts += 1
            try:
                await self._take(await WorkerProcess.start(self.config))
                break
            except (PacevlmError, OSError) as error:
                log.error("no worker could be started: %s", error)
                self.schedule.expect(time.perf_counter() + pause_s + self._load_s)
                if self._is_stopping and not self.schedule.waiting:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
        self.schedule.end(time.perf_counter())

    async def _take(self, worker: WorkerProcess) -> None:
        """Wait until a worker is warm; raises what it could not do."""
        started_s = time.perf_counter()
        self._worker = worker
        try:
            message = await worker.receive()
        except (ConnectionError, asyncio.IncompleteReadError):
            message = {"type": "failed", "error": "WorkerError", "message": "the worker died while it loaded"}
        if message["type"] == "failed":
            await worker.kill()
            raise _error(message)
        self.outlook.know_lengths(np.frombuffer(worker.body, "<f8"))
        self._load_s = time.perf_counter() - started_s
        self.schedule.factor = message["drift_factor"]
        self.ready = True
        log.info("a worker is ready after %.1f s", self._load_s)


def _message(ticket: Ticket, turn: Turn) -> dict[str, Any]:
    job = ticket.job
    return {
        "type": "run",
        "request_id": job.request_id,
        "question": job.question,
        "budgets_ms": ticket.look.budgets_ms,
        "price": job.price,
        "knobs": None if job.knobs is None else str(job.knobs),
        "max_new_tokens": job.max_new_tokens,
        "arrived_s": job.arrived_s,
        "until_s": turn.until_s,
        "least_price": turn.price,
        "stream": job.stream,
    }


def _bound_s(turn: Turn) -> float:
    return turn.entry.dearest_ms / 1e3 if math.isfinite(turn.entry.dearest_ms) else 0.0


def _error(message: dict[str, Any]) -> PacevlmError:
    kind = getattr(errors, message["error"], WorkerError)
    known = isinstance(kind, type) and issubclass(kind, PacevlmError) and kind is not OverloadError
    error: PacevlmError = (kind if known else WorkerError)(message["message"])
    return error
