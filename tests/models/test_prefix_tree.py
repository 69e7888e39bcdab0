"""A tree of rows parts exactly where they part, and gives every row what its branch has."""

from __future__ import annotations

import random

import torch

from pacevlm.models.prefix_tree import PrefixTree


def test_branches_are_the_rows_with_one_history() -> None:
    rng = random.Random(0)
    for num_rows in (1, 2, 9):
        starts = [rng.choice("abc") for _ in range(num_rows)]
        kept = [frozenset(block for block in range(6) if rng.random() < 0.7) for _ in range(num_rows)]
        tree = PrefixTree(starts, kept)
        # What a branch has gone through, as numbers: its start, then a digit for each block.
        x = torch.tensor([["abc".index(starts[rows[0]])] for rows in tree.branches])
        for block in range(6):
            x, members = tree.split(block, x)
            assert len(x) == len(tree.branches)
            inside = range(len(tree.branches)) if members is None else members
            x = torch.cat([x, torch.tensor([[int(i in inside)] for i in range(len(x))])], dim=1)
            histories = [(starts[row], *(b in kept[row] for b in range(block + 1))) for row in range(num_rows)]
            assert len(tree.branches) == len(set(histories))
            assert sorted(row for rows in tree.branches for row in rows) == list(range(num_rows))
            for rows in tree.branches:
                assert len({histories[row] for row in rows}) == 1
            assert all(row in rows for row, rows in zip(tree.some_row(), tree.branches, strict=True))
            rows, values = tree.spread(members, x if members is None else x[members])
            keeping = [row for row in range(num_rows) if block in kept[row]]
            assert (list(range(num_rows)) if rows is None else rows.tolist()) == keeping
            expected = [["abc".index(h[0]), *map(int, h[1:])] for h in (histories[row] for row in keeping)]
            assert values.tolist() == expected
