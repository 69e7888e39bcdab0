"""Work shared out over ranks: what is likely to end together, and what to take when that turns out wrong."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Group = TypeVar("Group", bound=Hashable)

# A chunk is at most this part of what is left for each rank, so that ranks end together.
PARTS_LEFT = 2
# Fewer rows fill no batch and are left to the rank whose they are; the first ones tell how fast a rank is.
FEW_ROWS, FIRST_ROWS = 16, 4
# A killed rank loses no more than its chunk.
MOST_SECONDS = 10.0


@dataclass(frozen=True)
class Piece(Generic[Group]):
    """What can be known of one unit of work beforehand.

    Attributes:
        group: pieces of one group share a setup on the rank that runs them, here a prefix.
        cost: in any unit.
        length: tokens of its prompt.
    """

    group: Group
    cost: float
    length: int


def share_out(
    costs: Mapping[Group, float],
    setup_costs: Mapping[Group, float],
    ready: Mapping[Group, Collection[int]],
    num_ranks: int,
) -> dict[Group, int]:
    """The rank of each group: dearest first, each to the rank that would have done it first.

    Method: list scheduling, longest processing time first (Graham 1969), with setup times.

    Args:
        costs: of each group, its setup left out.
        setup_costs: what a group costs besides on a rank that is not ready for it.
        ready: ranks that are.
    """
    loads = [0.0] * num_ranks
    chosen: dict[Group, int] = {}
    for group in sorted(costs, key=lambda group: -costs[group] - setup_costs[group]):
        there = ready.get(group, ())
        ends = [load + costs[group] + (0 if rank in there else setup_costs[group]) for rank, load in enumerate(loads)]
        chosen[group] = min(range(num_ranks), key=ends.__getitem__)
        loads[chosen[group]] = ends[chosen[group]]
    return chosen


class SharedWork(Generic[Key, Group]):
    """Keys in one queue for each rank; a rank whose queue is empty takes from the end of the fullest one.

    Any number of threads may take.

    Args:
        keys: in the order in which a rank runs them.
        pieces: what is known of each.
        rank_of: whose queue a group is in.
        seconds_per_cost: how fast each rank was, None where that is not known; kept up to date here.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        pieces: Mapping[Key, Piece[Group]],
        rank_of: Mapping[Group, int],
        seconds_per_cost: list[float | None],
    ) -> None:
        self._pieces, self._pace, self._lock = pieces, seconds_per_cost, Lock()
        queues: defaultdict[int, deque[Key]] = defaultdict(deque)
        for key in keys:
            queues[rank_of[pieces[key].group]].append(key)
        self._queues = [queues[rank] for rank in range(len(seconds_per_cost))]
        self._left = sum(pieces[key].cost for key in keys)

    def take(self, rank: int, max_rows: int, max_tokens: int, num_threads: int = 1) -> list[Key]:
        """The next chunk for one of a rank's threads; empty where nothing is left that is worth taking.

        Args:
            max_rows, max_tokens: what a batch may hold, padding included.
            num_threads: how many threads of this rank take chunks.
        """
        with self._lock:
            queue = self._queues[rank]
            is_own = bool(queue)
            if not is_own:
                queue = max(self._queues, key=len)
                if len(queue) <= FEW_ROWS:
                    return []
            pace = self._pace[rank]
            fair_cost = self._left / (PARTS_LEFT * len(self._queues) * num_threads)
            chunk: list[Key] = []
            cost, longest = 0.0, 0
            while queue and len(chunk) < max_rows:
                piece = self._pieces[queue[0] if is_own else queue[-1]]
                longest, cost = max(longest, piece.length), cost + piece.cost
                is_fair = len(chunk) < FEW_ROWS or cost <= fair_cost
                is_quick = len(chunk) < FIRST_ROWS if pace is None else cost * pace <= MOST_SECONDS
                if chunk and not (is_fair and is_quick and (len(chunk) + 1) * longest <= max_tokens):
                    break
                chunk.append(queue.popleft() if is_own else queue.pop())
            self._left -= sum(self._pieces[key].cost for key in chunk)
            return chunk

    def took(self, rank: int, chunk: Sequence[Key], seconds: float) -> None:
        """How long a rank took for a chunk."""
        cost = sum(self._pieces[key].cost for key in chunk)
        with self._lock:
            self._pace[rank] = seconds / max(cost, 1e-9)
