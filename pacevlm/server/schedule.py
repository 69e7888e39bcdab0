"""Who is accepted, who runs next and how long it may take: earliest deadline first, on one worker, without a clock.

Points in time are seconds of any steady clock, given as arguments, so that a simulation, the tests and the server run
the same lines.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field, replace

from pacevlm.knobs import MAX_PRICE

# Weight of the newest request in averages.
NEWEST = 0.02


@dataclass(frozen=True)
class Entry:
    """What the queue knows of a request; durations are those of the machine as profiled.

    Attributes:
        key: names it.
        deadline_s: when its whole answer must be there.
        cheapest_ms: what its cheapest knobs are predicted to take.
        bound_ms: the upper bound on that.
        dearest_ms: the upper bound on all of its knobs.
        due_s: the deadline that it is sorted by, and promised; its own, or an earlier one.
    """

    key: str
    deadline_s: float
    cheapest_ms: float
    bound_ms: float
    dearest_ms: float
    due_s: float = field(default=math.nan)

    def __post_init__(self) -> None:
        if math.isnan(self.due_s):
            object.__setattr__(self, "due_s", self.deadline_s)


@dataclass(frozen=True)
class Refusal:
    """Why a request was not accepted.

    Attributes:
        retry_s: from when on one like it, with as long a budget, is accepted if nothing else arrives.
        soonest_s: the earliest deadline that could be promised to it now.
    """

    retry_s: float
    soonest_s: float


@dataclass(frozen=True)
class Turn:
    """A request that begins.

    Attributes:
        entry: which one.
        until_s: when it must be over, for itself and for all that wait behind it.
        price: what time is worth to others, in points of accuracy for one whole full latency.
    """

    entry: Entry
    until_s: float
    price: float


class Schedule:
    """The queue of one worker that runs requests one after another and never interrupts one.

    A request is accepted if it and all that were accepted before it still keep their deadlines when each runs with its
    cheapest knobs behind what is left of the running one. For every request its own bound counts, for those in front of
    it what they are predicted to take: their errors even out. The one whose turn comes may take as long as all behind
    it leave it, so answers get cheaper before any is late.

    Under load time has a price, so that nobody spends for little what others are refused for: of the requests that
    could be answered with their cheapest knobs in one full latency, the share that was refused lately would be there,
    each worth up to a right answer. That is the shadow price of time; without it the first in a queue spends all slack.
    Time in which nothing ran counts as the requests that could have run in it, so that a quiet queue soon forgets the
    price of an overload, and a busy one does not.

    Nobody starves: a deadline comes closer, and only requests with earlier ones go first, which are accepted only as
    long as it is kept.

    Method: earliest deadline first is optimal on one machine (Jackson, "Scheduling a production line to minimize
    maximum tardiness", 1955).

    Args:
        max_waiting: most requests that wait.

    Attributes:
        waiting: accepted and not begun, by the deadlines they were promised.
        free_s: when the running request is over at the latest; minus infinity while none runs.
        factor: how many times slower than profiled the machine is, for bounds.
        pace: how many times their predictions requests took lately, on average.
        gap_ms: what passes on the worker between two requests.
        refused: share of the latest requests that were refused because of others.
    """

    def __init__(self, max_waiting: int = 256) -> None:
        self.max_waiting = max_waiting
        self.waiting: list[Entry] = []
        self.free_s, self._ended_s = -math.inf, math.inf
        self.factor, self.pace, self.gap_ms, self.refused = 1.0, 1.0, 0.0, 0.0

    def admit(self, entry: Entry, now_s: float, *, is_lightest: bool = False) -> Refusal | None:
        """Accept a request into the queue, or say why not.

        A larger budget is never refused where a smaller one would be accepted: a request that fits only in front of
        others with earlier deadlines is promised an earlier one itself.

        Args:
            is_lightest: the request itself may take longer than the entry. It is refused if even that does not fit
                behind others, and else neither accepted nor counted.
        """
        soonest_s = self.soonest_s(entry, now_s)
        is_refused = entry.due_s < soonest_s or len(self.waiting) >= self.max_waiting
        others_are_to_blame = now_s + self._bound_s(entry) <= entry.deadline_s
        if is_lightest:
            if not (is_refused and others_are_to_blame):
                return None
            entry = replace(entry, bound_ms=math.inf)  # whatever it takes, it is accepted once all others are over
        if others_are_to_blame:
            self.refused += NEWEST * (is_refused - self.refused)
        if is_refused:
            return Refusal(self.retry_s(entry, now_s), soonest_s)
        place = bisect.bisect_right(self.waiting, entry.due_s, key=_due_s)
        if not self._fits(entry, place, now_s):
            place = bisect.bisect_right(self.waiting, soonest_s, key=_due_s)
            entry = replace(entry, due_s=soonest_s)
        self.waiting.insert(place, entry)
        return None

    def readmit(self, entry: Entry) -> None:
        """Put a request back that had begun and must begin again; it was accepted, so nothing is checked."""
        bisect.insort(self.waiting, entry, key=_due_s)

    def start(self, now_s: float) -> Turn | None:
        """Begin the first request; None where nobody waits. Remove those with `expire` before."""
        if not self.waiting:
            return None
        entry = self.waiting.pop(0)
        # What those behind leave: each must begin so early that its bound fits, behind those in between.
        until_s, between_s = entry.deadline_s, 0.0
        for other in self.waiting:
            until_s = min(until_s, other.due_s - self._bound_s(other) - between_s)
            between_s += self._take_s(other)
        until_s = max(until_s - self.gap_ms / 1e3, now_s)
        self.free_s = min(max(until_s, now_s + self._bound_s(entry)), now_s + self._most_s(entry))
        self.refused *= (1 - NEWEST) ** (max(now_s - self._ended_s, 0.0) / self._most_s(entry))
        price = 100 * self.refused * entry.dearest_ms / entry.bound_ms
        return Turn(entry, until_s, min(price, MAX_PRICE))

    def expect(self, end_s: float) -> None:
        """The running request, whose knobs are chosen, will be over by then at the latest."""
        self.free_s = end_s + self.gap_ms / 1e3

    def end(self, now_s: float) -> None:
        """The running request is over."""
        self.free_s, self._ended_s = -math.inf, now_s

    def learn(self, predicted_ms: float, took_ms: float) -> None:
        """Follow what requests take on average.

        Args:
            predicted_ms: what the knobs that ran were predicted to take before the request began.
            took_ms: what it took.
        """
        self.pace += NEWEST * (took_ms / predicted_ms - self.pace)

    def cancel(self, key: str) -> bool:
        """Give up a waiting request's place; False if it does not wait."""
        for place, entry in enumerate(self.waiting):
            if entry.key == key:
                del self.waiting[place]
                return True
        return False

    def expire(self, now_s: float) -> list[Entry]:
        """Take out the requests whose deadline is over."""
        gone = [entry for entry in self.waiting if entry.deadline_s <= now_s]
        if gone:
            self.waiting = [entry for entry in self.waiting if entry.deadline_s > now_s]
        return gone

    def soonest_s(self, entry: Entry, now_s: float) -> float:
        """The earliest deadline that could be promised to a request now, whatever its own."""
        starts = self._starts_s(now_s)
        slacks = [
            other.due_s - self._bound_s(other) - start for other, start in zip(self.waiting, starts, strict=False)
        ]
        take_s, bound_s = self._take_s(entry), self._bound_s(entry)
        least = math.inf  # slack of those behind a place
        allowed = [True]
        for slack in reversed(slacks):
            least = min(least, slack)
            allowed.append(least >= take_s)
        before_s = -math.inf
        for place, is_allowed in enumerate(reversed(allowed)):
            soonest_s = max(starts[place] + bound_s, before_s)
            last = place == len(self.waiting)
            if is_allowed and (last or soonest_s < self.waiting[place].due_s):
                return soonest_s
            before_s = -math.inf if last else self.waiting[place].due_s
        raise AssertionError("the last place is always allowed")

    def retry_s(self, entry: Entry, now_s: float) -> float:
        """From when on a request with as long a budget is surely accepted, if nothing else arrives.

        By then all that is accepted is over at the latest, or so nearly that the budget covers the rest.
        """
        over_s, first_s = max(now_s, self.free_s), -math.inf
        for other in self.waiting:
            # Kept promises end by the deadline. One that cannot be kept any more begins by then or never.
            kept_s = max(other.deadline_s, min(over_s, other.deadline_s) + self._bound_s(other))
            over_s = max(over_s, min(over_s + self._most_s(other), kept_s))
            first_s = over_s if first_s == -math.inf else first_s
        budget_s = entry.deadline_s - now_s
        spare_s = max(budget_s - self._bound_s(entry), 0.0)
        last_s = max((other.due_s for other in self.waiting), default=-math.inf)
        # Earlier than others that still wait it might have to go first, and they might have no time to spare.
        retry_s = max(over_s - spare_s, min(over_s, last_s - budget_s))
        return max(retry_s, now_s, first_s if len(self.waiting) >= self.max_waiting else now_s)

    def _fits(self, entry: Entry, place: int, now_s: float) -> bool:
        """Whether all keep their deadlines with a new entry in a place."""
        queue = [*self.waiting[:place], entry, *self.waiting[place:]]
        start_s = max(now_s, self.free_s)
        for number, other in enumerate(queue):
            if number >= place and start_s + self._bound_s(other) > other.due_s:
                return False
            start_s += self._take_s(other)
        return True

    def _starts_s(self, now_s: float) -> list[float]:
        """When each waiting request begins if all run at their cheapest, and when the last one is over."""
        starts = [max(now_s, self.free_s)]
        for entry in self.waiting:
            starts.append(starts[-1] + self._take_s(entry))
        return starts

    def _take_s(self, entry: Entry) -> float:
        return (entry.cheapest_ms * self.pace + self.gap_ms) / 1e3

    def _bound_s(self, entry: Entry) -> float:
        return (entry.bound_ms * self.factor + self.gap_ms) / 1e3

    def _most_s(self, entry: Entry) -> float:
        return (entry.dearest_ms * self.factor + self.gap_ms) / 1e3


def _due_s(entry: Entry) -> float:
    return entry.due_s
