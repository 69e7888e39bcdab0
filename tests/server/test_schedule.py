"""Laws of the queue: what is accepted is kept, what is refused is told the truth, and nobody starves."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pacevlm.server.schedule import Entry, Schedule

EPSILON_S = 1e-9
SEEDS = range(3)


def draw(rng: np.random.Generator, key: str, now_s: float, budgets: tuple[float, ...] = (1, 1.5, 2, 4, 40)) -> Entry:
    """A request whose full knobs take some 30 ms and its cheapest a third of that, with a budget in full latencies."""
    cheapest_ms = float(rng.uniform(5, 15))
    bound_ms = cheapest_ms * float(rng.uniform(1.0, 1.5))
    budget_ms = 30 * float(rng.choice(budgets)) * float(rng.uniform(0.9, 1.1))
    return Entry(key, now_s + budget_ms / 1e3, cheapest_ms, bound_ms, bound_ms * float(rng.uniform(1.0, 4.0)))


class World:
    """One worker that keeps what it is told: a request takes at least its cheapest, and at most what it was given."""

    def __init__(self, rng: np.random.Generator, max_waiting: int = 256, gap_ms: float = 0.0) -> None:
        self.rng, self.schedule, self.now_s = rng, Schedule(max_waiting), 0.0
        self.schedule.gap_ms = gap_ms
        self.end_s = -math.inf
        self.done: dict[str, float] = {}
        self.running: Entry | None = None
        self.order: list[str] = []

    def advance(self, until_s: float) -> None:
        """Run until then, and begin what can begin by then."""
        while True:
            if self.running is not None:
                if self.end_s > until_s:
                    break
                self.now_s = self.end_s
                self.done[self.running.key] = self.now_s
                self.running = None
                self.schedule.end(self.now_s)
            assert self.schedule.expire(self.now_s) == []  # nothing accepted comes too late
            turn = self.schedule.start(self.now_s)
            if turn is None:
                break
            self.running = turn.entry
            self.order.append(turn.entry.key)
            cheapest_s, dearest_s = turn.entry.cheapest_ms / 1e3, turn.entry.dearest_ms / 1e3
            given_s = max(turn.until_s - self.now_s, cheapest_s)
            # Often all that it was given, which leaves those behind no time to spare.
            share = float(self.rng.choice([0.0, 1.0, self.rng.uniform()]))
            takes_s = cheapest_s + share * (max(min(given_s, dearest_s), cheapest_s) - cheapest_s)
            self.end_s = self.now_s + takes_s + self.schedule.gap_ms / 1e3
            if self.rng.uniform() < 0.5:
                self.schedule.expect(self.now_s + takes_s)
        self.now_s = max(self.now_s, until_s)


def arrivals(seed: int, load: float, number: int = 200, gap_ms: float = 0.0) -> Iterator[tuple[World, Entry]]:
    """A world and each request that reaches it, not submitted yet; load is in capacities at full knobs."""
    rng = np.random.default_rng(seed)
    world = World(np.random.default_rng([seed, 1]), gap_ms=gap_ms)
    time_s = 0.0
    for i in range(number):
        time_s += float(rng.exponential(0.030 / load))
        world.advance(time_s)
        yield world, draw(rng, str(i), time_s)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [0.5, 2.0, 6.0])
def test_what_is_accepted_is_kept(seed: int, load: float) -> None:
    accepted, num_refused = {}, 0
    for world, entry in arrivals(seed, load, gap_ms=0.5):
        before = list(world.schedule.waiting)
        if world.schedule.admit(entry, world.now_s) is None:
            accepted[entry.key] = entry
        else:
            num_refused += 1
            assert world.schedule.waiting == before
        dues = [waiting.due_s for waiting in world.schedule.waiting]
        assert dues == sorted(dues)
    world.advance(math.inf)
    assert world.done.keys() == accepted.keys()
    for key, entry in accepted.items():
        assert world.done[key] <= entry.deadline_s + EPSILON_S
    assert num_refused < 40 if load < 1 else num_refused > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_the_budget_of_the_head_leaves_all_behind_feasible(seed: int) -> None:
    given = 0
    for world, entry in arrivals(seed, 4.0):
        world.schedule.admit(entry, world.now_s)
        trial = copy.deepcopy(world.schedule)
        trial.end(world.now_s)
        turn = trial.start(world.now_s)
        if turn is None:
            continue
        # Whenever it is over, if that is in time, the rest keeps its deadlines at its cheapest.
        for end_s in (turn.until_s, world.now_s + turn.entry.cheapest_ms / 1e3):
            start_s = end_s
            for other in trial.waiting:
                if start_s == turn.until_s > world.now_s + turn.entry.cheapest_ms / 1e3:
                    given += 1
                assert start_s + other.bound_ms / 1e3 <= other.deadline_s + EPSILON_S
                start_s += other.cheapest_ms / 1e3
    assert given > 20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [1.5, 6.0])
def test_a_refusal_tells_the_truth(seed: int, load: float) -> None:
    num_refused = 0
    for number, (world, entry) in enumerate(arrivals(seed, load)):
        refusal = world.schedule.admit(entry, world.now_s)
        if refusal is None:
            continue
        num_refused += 1
        budget_s = entry.deadline_s - world.now_s
        assert refusal.retry_s >= world.now_s
        assert refusal.soonest_s > entry.deadline_s
        # With the soonest deadline it is accepted now, and with no earlier one.
        for earlier_s, is_taken in ((0.0, True), (1e-6, False)):
            trial = copy.deepcopy(world.schedule)
            deadline_s = refusal.soonest_s - earlier_s
            again = replace(entry, deadline_s=deadline_s, due_s=deadline_s)
            assert (trial.admit(again, world.now_s) is None) == is_taken
        # Later it is accepted with the same budget, if nothing else arrives, however the rest goes.
        if budget_s >= entry.bound_ms / 1e3:
            for later_s, fate in itertools.product((1e-6, 0.003, 0.05), range(2)):
                later = copy.deepcopy(world)
                later.rng = np.random.default_rng([seed, number, fate])
                retry_s = refusal.retry_s + later_s
                later.advance(retry_s)
                again = replace(entry, deadline_s=retry_s + budget_s, due_s=retry_s + budget_s)
                assert later.schedule.admit(again, retry_s) is None
    assert num_refused > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_hopeless_as_the_lightest_request_is_hopeless_as_itself(seed: int) -> None:
    """Refusing it without a look at it refuses nothing else, and the time that it is told is late enough."""
    num_shed = num_refused = 0
    for number, (world, entry) in enumerate(arrivals(seed, 6.0)):
        trial, before = copy.deepcopy(world.schedule), copy.deepcopy(world.schedule)
        lightest = replace(entry, cheapest_ms=5.0, bound_ms=5.0)
        refusal = trial.admit(lightest, world.now_s, is_lightest=True)
        is_refused = world.schedule.admit(entry, world.now_s) is not None
        num_refused += is_refused
        if refusal is None:
            assert (trial.waiting, trial.refused) == (before.waiting, before.refused)
            continue
        num_shed += 1
        assert is_refused
        assert trial.waiting == before.waiting
        assert trial.refused > before.refused
        budget_s = entry.deadline_s - world.now_s
        if budget_s >= entry.bound_ms / 1e3:
            later = copy.deepcopy(world)
            later.rng = np.random.default_rng([seed, number])
            later.advance(refusal.retry_s + EPSILON_S)
            again = replace(entry, deadline_s=later.now_s + budget_s, due_s=later.now_s + budget_s)
            assert later.schedule.admit(again, later.now_s) is None
    assert num_shed > 0.3 * num_refused > 5
    # One that nothing is promised to is left to be told so.
    assert Schedule().admit(Entry("a", 1.0, 5.0, math.inf, math.inf), 0.0, is_lightest=True) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_budget_is_never_refused_where_a_smaller_one_is_accepted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for world, entry in arrivals(seed, 4.0):
        deadlines_s = np.sort(world.now_s + rng.uniform(0.005, 0.3, 8))
        taken = []
        for deadline_s in deadlines_s.tolist():
            trial = copy.deepcopy(world.schedule)
            taken.append(trial.admit(replace(entry, deadline_s=deadline_s, due_s=deadline_s), world.now_s) is None)
        assert taken == sorted(taken)
        world.schedule.admit(entry, world.now_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_starves(seed: int) -> None:
    """Six times as many short budgets arrive as can be answered; the long ones among them are still kept."""
    rng = np.random.default_rng(seed)
    world, long, time_s = World(np.random.default_rng([seed, 1])), {}, 0.0
    num_short = 0
    for i in range(600):
        time_s += float(rng.exponential(0.030 / 6))
        world.advance(time_s)
        is_long = i % 40 == 5
        entry = draw(rng, str(i), time_s, budgets=(50.0,) if is_long else (1.0, 1.5, 2.0))
        is_accepted = world.schedule.admit(entry, time_s) is None
        if is_long:
            assert is_accepted  # there is always time for one before its deadline
            long[entry.key] = entry
        num_short += is_accepted and not is_long
    world.advance(math.inf)
    assert all(world.done[key] <= entry.deadline_s + EPSILON_S for key, entry in long.items())
    assert num_short > 50


def test_alone_it_is_given_all_of_its_budget() -> None:
    schedule = Schedule()
    schedule.gap_ms = 1.0
    assert schedule.admit(Entry("a", 1.0, 10.0, 12.0, 50.0), 0.5) is None
    turn = schedule.start(0.6)
    assert turn is not None
    assert turn.until_s == pytest.approx(0.999)
    assert schedule.start(0.6) is None


def test_the_earliest_deadline_is_first_and_equals_keep_their_order() -> None:
    schedule = Schedule()
    for key, deadline_s in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("b2", 2.0)):
        assert schedule.admit(Entry(key, deadline_s, 1.0, 1.0, 1.0), 0.0) is None
    started = [turn.entry.key for turn in iter(lambda: schedule.start(0.0), None)]
    assert started == ["a", "b", "b2", "c"]


def test_more_waiting_make_the_first_one_cheaper() -> None:
    """Under load answers get cheaper before any is late."""
    given_ms = []
    for number in range(8):
        schedule = Schedule()
        for i in range(number + 1):
            assert schedule.admit(Entry(str(i), 0.1, 10.0, 12.0, 50.0), 0.0) is None
        turn = schedule.start(0.0)
        assert turn is not None
        given_ms.append(turn.until_s * 1e3)
    assert given_ms[0] == pytest.approx(100.0)
    assert np.diff(given_ms) == pytest.approx([-12.0, *[-10.0] * 6])


def test_time_has_a_price_while_others_are_refused() -> None:
    schedule, entry = Schedule(), Entry("a", 0.1, 10.0, 12.0, 48.0)

    def price() -> float:
        trial = copy.deepcopy(schedule)
        turn = trial.start(0.0)
        assert turn is not None
        return turn.price

    assert schedule.admit(entry, 0.0) is None
    assert price() == 0.0
    for _ in range(100):  # nobody could keep these
        assert schedule.admit(Entry("b", 0.01, 10.0, 12.0, 48.0), 0.0) is not None
    assert price() == 0.0
    prices = []
    for _ in range(1000):  # these could be kept, if the others were not there
        assert schedule.admit(Entry("c", 0.0121, 10.0, 12.0, 48.0), 0.0) is not None or len(schedule.waiting) == 2
        prices.append(price())
    assert prices == sorted(prices)
    assert prices[-1] == pytest.approx(400.0, rel=1e-3)  # all of the four that there would be time for
    for number in range(300):
        schedule.waiting.clear()
        assert schedule.admit(replace(entry, key=str(number)), 0.0) is None
    assert price() < 2.0


def test_a_quiet_queue_forgets_the_price_and_a_busy_one_does_not() -> None:
    def price_after(quiet_s: float, num_requests: int) -> float:
        """Of a request after an overload, a pause, and some requests that run one right after another."""
        schedule = Schedule()
        schedule.refused = 0.8
        schedule.end(1.0)
        now_s = 1.0 + quiet_s
        for number in range(num_requests):
            assert schedule.admit(Entry(str(number), now_s + 1.0, 10.0, 12.0, 50.0), now_s) is None
            turn = schedule.start(now_s)
            assert turn is not None
            now_s += 0.05
            schedule.end(now_s)
        return turn.price

    at_once = price_after(0.0, 1)
    assert at_once == pytest.approx(100 * 0.8 * 0.98 * 50 / 12)
    prices = [price_after(quiet_s, 1) for quiet_s in (0.0, 0.5, 5.0, 50.0)]
    assert prices == sorted(prices, reverse=True)
    # As if requests had run in that time, each as long as this one may; a busy queue forgets by requests alone.
    assert price_after(5.0, 1) == pytest.approx(price_after(0.0, 101))
    assert prices[-1] < 1e-6 * at_once
    assert price_after(0.0, 35) == pytest.approx(at_once / 2, rel=0.01)


def test_a_slower_machine_takes_fewer() -> None:
    def num_accepted(factor: float, pace: float) -> int:
        schedule = Schedule()
        schedule.factor, schedule.pace = factor, pace
        return sum(schedule.admit(Entry(str(i), 0.1, 10.0, 12.0, 50.0), 0.0) is None for i in range(20))

    assert num_accepted(1.0, 1.0) == 9  # the last one has 12 ms left
    assert num_accepted(2.0, 2.0) == 4
    assert num_accepted(3.0, 1.0) == 7
    assert num_accepted(10.0, 1.0) == 0


def test_a_promise_that_cannot_be_kept_any_more_is_made_no_worse() -> None:
    schedule = Schedule()
    assert schedule.admit(Entry("late", 0.1, 10.0, 12.0, 50.0), 0.0) is None
    now_s = 0.095  # the worker was away
    assert schedule.admit(Entry("first", 0.112, 10.0, 12.0, 50.0), now_s) is not None
    assert schedule.admit(Entry("behind", 0.5, 10.0, 12.0, 50.0), now_s) is None
    turn = schedule.start(now_s)
    assert turn is not None
    assert turn.entry.key == "late"


def test_a_place_can_be_given_up_and_taken_again() -> None:
    schedule = Schedule(max_waiting=2)
    entries = [Entry(str(i), 1.0 + i, 10.0, 12.0, 50.0) for i in range(3)]
    assert [schedule.admit(entry, 0.0) is None for entry in entries] == [True, True, False]
    refusal = schedule.admit(entries[2], 0.0)
    assert refusal is not None
    assert refusal.soonest_s < 1.0
    assert 0.0 < refusal.retry_s <= 0.1  # once the first has begun or is over
    assert schedule.cancel("0")
    assert not schedule.cancel("0")
    assert schedule.admit(entries[2], 0.0) is None
    turn = schedule.start(0.0)
    assert turn is not None
    schedule.end(0.0)
    schedule.readmit(turn.entry)
    assert [entry.key for entry in schedule.waiting] == ["1", "2"]
    assert [entry.key for entry in schedule.expire(2.0)] == ["1"]
    assert [entry.key for entry in schedule.waiting] == ["2"]


def test_a_request_goes_first_rather_than_be_refused() -> None:
    """Behind others its own deadline could not be kept, but in front of them there is time: it is promised that."""
    schedule = Schedule()
    assert schedule.admit(Entry("slow", 0.100, 40.0, 50.0, 60.0), 0.0) is None
    assert schedule.admit(Entry("new", 0.105, 20.0, 80.0, 90.0), 0.0) is None
    assert [entry.key for entry in schedule.waiting] == ["new", "slow"]
    assert schedule.waiting[0].due_s < 0.100 < schedule.waiting[0].deadline_s
