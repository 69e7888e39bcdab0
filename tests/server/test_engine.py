"""The engine with a real worker process: nothing that is accepted is lost, whatever happens to either."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pacevlm.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    ImageError,
    KnobError,
    OverloadError,
    PacevlmError,
    QuestionError,
    WorkerError,
)
from pacevlm.knobs import Knobs
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.server.config import ServeConfig
from pacevlm.server.engine import Engine
from pacevlm.server.job import Job, Served
from pacevlm.server.ticket import Ticket
from pacevlm.server.worker_process import WorkerProcess
from pacevlm.types import BudgetKind

QUESTION = "How many red digits are there?"
LONG_MS = 600_000.0
ResultT = TypeVar("ResultT")


class Running:
    """An engine in an event loop of its own thread, as tests talk to it."""

    def __init__(self, config: ServeConfig, picture: bytes) -> None:
        self.engine, self.picture = Engine(config), picture
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.count = 0

    def do(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(100)

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        async def work() -> ResultT:
            return function()

        return self.do(work())

    def job(self, **values: Any) -> Job:
        self.count += 1
        given = {"image": self.picture, "question": QUESTION, "arrived_s": time.perf_counter(), "budgets_ms": {}}
        return Job(**{"request_id": str(self.count), **given, **values})

    def submit(self, **values: Any) -> Ticket:
        return self.call(lambda: self.engine.submit(self.job(**values)))

    def wait(self, ticket: Ticket) -> list[str | Served]:
        async def events() -> list[str | Served]:
            return [event async for event in ticket]

        return self.do(events())

    def result(self, ticket: Ticket) -> Served:
        *_, served = self.wait(ticket)
        assert isinstance(served, Served)
        return served

    @property
    def worker_pid(self) -> int:
        worker = self.engine._worker
        assert worker is not None
        return worker.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.worker_pid, number)

    def until(self, is_so: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 60
        while not self.call(is_so):
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def running(served_run: Path, picture: bytes) -> Iterator[Running]:
    server = Running(ServeConfig(run_dir=served_run, max_waiting=100), picture)
    assert not server.engine.ready
    server.do(server.engine.start())
    assert server.engine.ready
    yield server
    with suppress(ProcessLookupError):
        server.signal(signal.SIGCONT)
    server.do(server.engine.stop())
    server.close()


def test_it_says_what_the_front_must_know(running: Running, tiny_elastic: ElasticModel) -> None:
    outlook = running.engine.outlook
    assert outlook.knob_space == tiny_elastic.knob_space
    assert outlook.full_p50_ms == 1700.0
    assert set(outlook.kinds) == {"e2e", "ttft"}
    assert outlook.max_positions == tiny_elastic.adapter.max_positions


def test_a_request_is_answered_within_its_budget(running: Running, tiny_elastic: ElasticModel) -> None:
    before = running.call(lambda: dataclasses.replace(running.engine.stats()))
    served = running.result(running.submit(budgets_ms={"e2e": 5000.0}, price=0.0))
    answer = served.answer
    assert answer.answer == run_forced(tiny_elastic, running.picture, QUESTION, answer.knobs).answer
    assert answer.budget_met
    assert (answer.budget_ms, answer.kind, answer.price) == (5000.0, "e2e", 0.0)
    assert served.queue_ms == answer.waited_ms
    assert served.finished_s <= time.perf_counter()
    assert (served.attempts, served.finish_reason) == (1, "length")
    after = running.call(running.engine.stats)
    assert (after.accepted - before.accepted, after.answered - before.answered, after.late) == (1, 1, 0)
    assert (after.waiting, after.running) == (0, 0)


def test_no_budget_means_four_times_the_median(running: Running) -> None:
    answer = running.result(running.submit()).answer
    assert (answer.budget_ms, answer.kind) == (6800.0, "e2e")


def test_pieces_add_up_to_the_answer(running: Running) -> None:
    full = running.engine.outlook.knob_space.full
    *pieces, served = running.wait(running.submit(knobs=full, stream=True))
    assert isinstance(served, Served)
    assert "".join(map(str, pieces)) == served.answer.answer
    assert len(pieces) > 1


def test_both_kinds_of_budget_and_shorter_answers(running: Running) -> None:
    answer = running.result(running.submit(budgets_ms={"ttft": 4000.0, "e2e": 5000.0}, max_new_tokens=1)).answer
    assert (answer.kind, answer.budget_ms, answer.other_budget_ms) == ("e2e", 5000.0, 4000.0)
    assert answer.num_output_tokens == 1
    answer = running.result(running.submit(budgets_ms={"ttft": 4000.0}, max_new_tokens=1000)).answer
    assert (answer.kind, answer.budget_ms, answer.other_budget_ms) == ("ttft", 4000.0, None)
    assert answer.budget_met


def test_knobs_that_are_asked_for_run(running: Running) -> None:
    space = running.engine.outlook.knob_space
    for knobs in (space.full, space.cheapest, Knobs("medium", 3, 4)):
        assert running.result(running.submit(knobs=knobs)).answer.knobs == knobs


def test_a_question_alone_is_answered(running: Running) -> None:
    assert running.result(running.submit(image=None)).answer.sizes.num_pixels == 0


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"image": b"no picture"}, ImageError),
        ({"image": b""}, ImageError),
        ({"question": ""}, QuestionError),
        ({"question": "red " * 1000}, QuestionError),
        ({"knobs": Knobs("low", 99, 3)}, KnobError),
        ({"budgets_ms": {"e2e": -1.0}}, BudgetError),
        ({"budgets_ms": {"e2e": 1e9}}, BudgetError),
        ({"budgets_ms": {"e2e": 100.0}}, BudgetError),  # less than the cheapest knobs' bound
        ({"budgets_ms": {"ttlt": 100.0}}, ConfigError),
        ({"price": -1.0}, ConfigError),
        ({"max_new_tokens": 0}, ConfigError),
        ({"arrived_s": -1e6, "budgets_ms": {"e2e": 5000.0}}, DeadlineError),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    running: Running, values: dict[str, Any], error: type[PacevlmError]
) -> None:
    with pytest.raises(error):
        running.submit(**values)
    assert running.call(running.engine.stats).waiting == 0


@pytest.mark.parametrize("budgets_ms", [{"e2e": 100.0}, {"ttft": 100.0}, {"e2e": 50_000.0, "ttft": 100.0}])
def test_a_refusal_names_the_budget_that_was_asked_for(running: Running, budgets_ms: dict[BudgetKind, float]) -> None:
    with pytest.raises(BudgetError, match="a budget of 100 ms is too small"):
        running.submit(budgets_ms=budgets_ms)


def test_a_poisonous_picture_hurts_nobody_else(running: Running, picture: bytes) -> None:
    """Its header is right and its pixels are not, which only the worker finds out."""
    cut = picture[: len(picture) // 2]
    with pytest.raises(ImageError):
        running.wait(running.submit(image=cut, budgets_ms={"e2e": 5000.0}))
    assert running.result(running.submit()).answer.budget_met
    assert running.call(running.engine.stats).restarts == 0


def test_more_than_can_be_answered_is_refused_with_the_truth(running: Running) -> None:
    """While the worker is held, requests are taken as long as each could still be in time."""
    running.signal(signal.SIGSTOP)
    tickets = []
    refused = None
    while refused is None:
        try:
            tickets.append(running.submit(budgets_ms={"e2e": 10_000.0}))
        except OverloadError as error:
            refused = error
    assert 2 <= len(tickets) <= 15
    assert "try again in" in str(refused)
    assert 0 < refused.retry_after_s < 20
    assert refused.soonest_budget_ms > 10_000.0
    soonest_ms = refused.soonest_budget_ms + 100.0  # what passes until it is asked for
    tickets.append(running.submit(budgets_ms={"e2e": soonest_ms}))
    running.signal(signal.SIGCONT)
    assert all(running.result(ticket).answer.budget_met for ticket in tickets)


def test_while_most_is_refused_what_is_hopeless_is_not_looked_at(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, looks = running.engine, []
    look = engine.outlook.look
    least = look(running.job())
    lightest_ms = float(least.predicted_ms[least.least]), float(least.bounds_ms["e2e"][least.least])
    assert all(np.array(engine.outlook.lightest_ms) < lightest_ms)
    monkeypatch.setattr(engine.outlook, "lightest_ms", lightest_ms)  # else it depends on what is left of the queue
    monkeypatch.setattr(engine.outlook, "look", lambda job: looks.append(job) or look(job))
    running.signal(signal.SIGSTOP)
    tickets = []
    with suppress(OverloadError):
        while True:
            tickets.append(running.submit(budgets_ms={"e2e": 10_000.0}))
    for refused, num_looks in ((0.4, 1), (0.6, 0)):
        engine.schedule.refused = refused
        looks.clear()
        with pytest.raises(OverloadError, match="try again in"):
            running.submit(budgets_ms={"e2e": 5_000.0})
        assert len(looks) == num_looks
    with pytest.raises(BudgetError):  # what nobody could answer is told so as ever
        running.submit(budgets_ms={"e2e": 100.0})
    tickets.append(running.submit(budgets_ms={"e2e": LONG_MS}))
    running.signal(signal.SIGCONT)
    assert all(running.result(ticket).answer.budget_met for ticket in tickets)


def test_by_predictions_more_is_accepted_than_by_bounds(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.engine
    look = engine.outlook.look(running.job())
    between_ms = float(look.predicted_ms[look.least] + look.bounds_ms["e2e"][look.least]) / 2
    with pytest.raises(BudgetError):
        running.submit(budgets_ms={"e2e": between_ms})
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, admission="predictions"))
    answer = running.result(running.submit(budgets_ms={"e2e": between_ms})).answer
    assert answer.knobs == engine.outlook.knob_space.cheapest
    assert not answer.feasible  # nothing was promised
    with pytest.raises(BudgetError):
        running.submit(budgets_ms={"e2e": 0.9 * float(look.predicted_ms[look.least])})


def test_the_earliest_deadline_is_answered_first_and_a_client_may_leave(running: Running) -> None:
    running.signal(signal.SIGSTOP)
    budgets_ms = [60_000.0, 50_000.0, 20_000.0, 40_000.0, 30_000.0]
    first, *tickets = [running.submit(budgets_ms={"e2e": budget_ms}) for budget_ms in budgets_ms]
    running.until(lambda: running.engine.stats().running == 1)
    running.call(tickets[1].cancel)  # waits
    running.call(first.cancel)  # runs
    running.call(first.cancel)
    assert running.call(running.engine.stats).waiting == 3
    running.signal(signal.SIGCONT)
    finished = [running.result(ticket).finished_s for ticket in (tickets[3], tickets[2], tickets[0])]
    assert finished == sorted(finished)
    for ticket in (first, tickets[1]):
        with pytest.raises(DeadlineError, match="cancelled"):
            running.wait(ticket)
    assert running.call(running.engine.stats).cancelled == 2


def test_a_deadline_that_passes_in_the_queue_is_refused_not_run(running: Running) -> None:
    running.signal(signal.SIGSTOP)
    cheapest = running.engine.outlook.knob_space.cheapest
    first = running.submit(budgets_ms={"e2e": LONG_MS}, knobs=cheapest)
    running.until(lambda: running.engine.stats().running == 1)
    short = running.submit(budgets_ms={"e2e": 3500.0})
    with pytest.raises(DeadlineError, match="before the request could begin"):
        running.wait(short)  # at its deadline, though the worker is still held
    running.signal(signal.SIGCONT)
    assert running.result(first).attempts == 1


def test_a_killed_worker_is_replaced_and_nothing_is_lost(running: Running) -> None:
    running.signal(signal.SIGSTOP)
    tickets = [running.submit(budgets_ms={"e2e": LONG_MS}, stream=number == 0) for number in range(3)]
    running.until(lambda: running.engine.stats().running == 1)
    running.signal(signal.SIGKILL)
    running.until(lambda: not running.engine.ready)
    with pytest.raises((OverloadError, BudgetError)):  # nobody could answer that soon
        running.submit(budgets_ms={"e2e": 1500.0})
    late = running.submit(budgets_ms={"e2e": LONG_MS})
    served = [running.result(ticket) for ticket in (*tickets, late)]
    assert [one.attempts for one in served] == [2, 1, 1, 1]
    assert all(one.answer.budget_met for one in served)
    assert running.engine.ready
    assert running.call(running.engine.stats).restarts == 1


def test_a_request_that_kills_two_workers_is_given_up(running: Running) -> None:
    running.signal(signal.SIGSTOP)
    poison = running.submit(budgets_ms={"e2e": LONG_MS})
    other = running.submit(budgets_ms={"e2e": LONG_MS + 1000.0})
    for _ in range(2):
        running.until(lambda: running.engine.stats().running == 1)
        pid = running.worker_pid
        running.signal(signal.SIGKILL)
        # Held before it is sent the request again.
        running.until(lambda pid=pid: running.worker_pid != pid)  # type: ignore[misc]
        if poison.attempts < 2:
            running.engine._worker.send = hold(running, running.engine._worker.send)  # type: ignore[union-attr, method-assign]
    with pytest.raises(WorkerError, match="2 workers died"):
        running.wait(poison)
    assert running.result(other).attempts == 1
    assert running.call(running.engine.stats).restarts == 3


def hold(running: Running, send: Callable[..., None]) -> Callable[..., None]:
    """Stop the worker as soon as it is sent something."""

    def stop_first(*message: Any) -> None:
        running.signal(signal.SIGSTOP)
        send(*message)

    return stop_first


def test_a_machine_that_was_slow_is_probed_while_there_is_nothing_else_to_do(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pacevlm.server.engine.PROBE_EVERY_S", 0.01)
    schedule, before = running.engine.schedule, running.call(running.engine.stats).accepted

    def slow_down() -> None:
        schedule.factor, schedule.pace = 3.0, 2.0
        running.engine._wake.set()

    running.call(slow_down)
    running.until(lambda: schedule.factor <= 1.0 and schedule.pace <= 1.2)  # what requests of this profile show
    assert running.call(running.engine.stats).accepted == before
    assert schedule.free_s == -math.inf
    assert 0 < running.engine._num_probes < 60
    assert running.result(running.submit(budgets_ms={"e2e": 5000.0})).answer.budget_met


def test_drift_is_learned_and_stopping_finishes_what_was_accepted(running: Running, served_run: Path) -> None:
    tickets = [running.submit(budgets_ms={"e2e": LONG_MS}) for _ in range(5)]
    stopping = asyncio.run_coroutine_threadsafe(running.engine.stop(), running.loop)
    running.until(lambda: running.engine._is_stopping)
    with pytest.raises(WorkerError, match="not running"):
        running.submit()
    assert all(running.result(ticket).answer.budget_met for ticket in tickets)
    stopping.result(60)
    assert not running.engine.ready
    assert "estimator_fingerprint" in (served_run / "bundle-drift.json").read_text()


def test_what_cannot_be_served_is_said_at_the_start(served_run: Path, picture: bytes, tmp_path: Path) -> None:
    for config in (
        ServeConfig(run_dir=tmp_path),
        ServeConfig(run_dir=served_run / "bundle", policy="lookup_table", drift_path=tmp_path / "drift.json"),
    ):
        if config.policy == "lookup_table":
            (served_run / "lookup_table.json").rename(tmp_path / "away")
        server = Running(config, picture)
        with pytest.raises(CheckpointError):
            server.do(server.engine.start())
        server.do(server.engine.stop())
        server.close()


def test_neither_a_failed_start_nor_a_fault_leaves_anybody_waiting(
    served_run: Path, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Running(ServeConfig(run_dir=served_run, drift_path=tmp_path / "drift.json"), picture)
    server.do(server.engine.start())
    start, failures = WorkerProcess.start, [OSError("no more processes"), WorkerError("no memory")]

    async def start_at_last(config: ServeConfig) -> WorkerProcess:
        if failures:
            raise failures.pop()
        return await start(config)

    monkeypatch.setattr(WorkerProcess, "start", start_at_last)
    server.signal(signal.SIGSTOP)
    tickets = [server.submit(budgets_ms={"e2e": LONG_MS}) for _ in range(2)]
    server.until(lambda: server.engine.stats().running == 1)
    server.signal(signal.SIGKILL)
    assert [server.result(ticket).attempts for ticket in tickets] == [2, 1]
    assert not failures
    # No timer of a deadline outlives its request, however long the budget was.
    assert all(ticket.timer is not None and ticket.timer.cancelled() for ticket in tickets)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server.engine, "_learn", fail)
    server.signal(signal.SIGSTOP)
    first, *others = [server.submit(budgets_ms={"e2e": LONG_MS}) for _ in range(3)]
    server.signal(signal.SIGCONT)
    assert server.result(first).answer.budget_met
    for ticket in others:
        with pytest.raises(WorkerError, match="failed"):
            server.wait(ticket)
    assert not server.engine.ready
    with pytest.raises(WorkerError, match="not running"):
        server.submit()
    server.do(server.engine.stop())
    server.close()
