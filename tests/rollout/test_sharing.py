"""Work shared out over ranks: balanced by what is known, taken whole and once, in small chunks at the end."""

from __future__ import annotations

import numpy as np
import pytest

from pacevlm.rollout.sharing import FEW_ROWS, FIRST_ROWS, MOST_SECONDS, Piece, SharedWork, share_out


def test_groups_are_shared_out_evenly() -> None:
    rng = np.random.default_rng(0)
    costs = {number: float(cost) for number, cost in enumerate(rng.uniform(1, 10, 200))}
    rank_of = share_out(costs, dict.fromkeys(costs, 2.0), {}, 4)
    loads = [sum(costs[group] + 2 for group, at in rank_of.items() if at == rank) for rank in range(4)]
    assert max(loads) < 1.02 * min(loads)


def test_a_group_goes_where_it_was_prepared_unless_that_takes_longer() -> None:
    costs = dict.fromkeys(range(8), 1.0)
    ready = {group: {group % 2} for group in costs}
    assert share_out(costs, dict.fromkeys(costs, 5.0), ready, 2) == {group: group % 2 for group in costs}
    alone = share_out(costs, dict.fromkeys(costs, 0.5), {group: {1} for group in costs}, 2)
    assert set(alone.values()) == {0, 1}


Row = tuple[int, int]


def make_work(num_groups: int, rank: int | None = None) -> tuple[list[Row], SharedWork[Row, int]]:
    keys = [(group, row) for group in range(num_groups) for row in range(25)]
    pieces = {key: Piece(key[0], 1.0 + key[1], 100) for key in keys}
    rank_of = {group: group % 3 if rank is None else rank for group in range(num_groups)}
    return keys, SharedWork(keys, pieces, rank_of, [0.001] * 3)


@pytest.mark.parametrize("rank", [None, 2], ids=["shared", "all at one rank"])
def test_all_is_taken_once(rank: int | None) -> None:
    keys, work = make_work(12, rank)
    taken: list[Row] = []
    sizes = []
    busy = [0, 1, 2]
    while busy:
        for rank_now in list(busy):
            chunk = work.take(rank_now, 64, 10**6)
            taken += chunk
            sizes.append(len(chunk))
            if not chunk:
                busy.remove(rank_now)
    assert sorted(taken) == keys
    assert max(sizes) <= 64
    assert sizes[0] > max(sizes[-4:])


def test_few_rows_stay_with_their_rank() -> None:
    keys = [(0, row) for row in range(FEW_ROWS)]
    work = SharedWork(keys, {key: Piece(0, 1.0, 10) for key in keys}, {0: 1}, [0.001, 0.001])
    assert work.take(0, 64, 10**6) == []
    assert len(work.take(1, 64, 10**6)) == FEW_ROWS


def test_batches_keep_their_limits_and_take_seconds() -> None:
    keys = [(0, row) for row in range(100)]
    pieces = {key: Piece(0, 1.0, 10) for key in keys}
    assert len(SharedWork(keys, pieces, {0: 0}, [0.001]).take(0, 64, 70)) == 7
    assert len(SharedWork(keys, pieces, {0: 0}, [0.001]).take(0, 5, 10**6)) == 5
    assert len(SharedWork(keys, pieces, {0: 0}, [None]).take(0, 64, 10**6)) == FIRST_ROWS
    slow = SharedWork(keys, pieces, {0: 0}, [MOST_SECONDS / 3])
    assert len(slow.take(0, 64, 10**6)) == 3
    slow.took(0, keys[:3], 0.003)
    assert len(slow.take(0, 64, 10**6)) > 3
