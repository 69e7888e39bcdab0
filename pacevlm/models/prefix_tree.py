"""Shared work of rows that differ in depth: a tree that branches at the first block on which rows disagree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class PrefixTree:
    """Which rows of a batch are still the same: those of one prompt and one top_k, up to a block that only some keep.

    Every block runs once for each branch, so that a sweep over nested depths shares what the depths have in common.

    Args:
        starts: what every row starts from; rows with equal ones are the same to begin with.
        kept_blocks: blocks that every row runs.

    Attributes:
        branches: rows of every branch.
    """

    def __init__(self, starts: Sequence[Hashable], kept_blocks: Sequence[frozenset[int]]) -> None:
        same: dict[Hashable, list[int]] = {}
        for row, start in enumerate(starts):
            same.setdefault(start, []).append(row)
        self.branches = list(same.values())
        self._kept, self._num_rows = kept_blocks, len(starts)

    def split(self, block: int, x: Tensor) -> tuple[Tensor, list[int] | None]:
        """Part the branches in which only some rows keep a block.

        Args:
            x: `(branches, ...)`.

        Returns:
            x of the new branches, and the places of those that keep the block; None if all do.
        """
        branches: list[list[int]] = []
        source: list[int] = []
        members: list[int] = []
        for place, rows in enumerate(self.branches):
            inside = [row for row in rows if block in self._kept[row]]
            outside = [row for row in rows if block not in self._kept[row]]
            if inside:
                members.append(len(branches))
            parts = [part for part in (inside, outside) if part]
            branches += parts
            source += [place] * len(parts)
        if len(branches) > len(self.branches):
            x = x[torch.tensor(source, device=x.device)]
        self.branches = branches
        return x, None if len(members) == len(branches) else members

    def some_row(self, members: list[int] | None = None) -> list[int]:
        """A row of each branch, of the members alone if they are given."""
        return [self.branches[place][0] for place in (range(len(self.branches)) if members is None else members)]

    def spread(self, members: list[int] | None, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Give every row what its branch has.

        Args:
            members: places of the branches that have something; None if all do.
            values: one entry per member.

        Returns:
            the rows that got something, in order, or None if all did; and their values.
        """
        of_members = self.branches if members is None else [self.branches[place] for place in members]
        place_of = {row: place for place, rows in enumerate(of_members) for row in rows}
        rows = sorted(place_of)
        places = [place_of[row] for row in rows]
        if places != list(range(len(values))):
            values = values[torch.tensor(places, device=values.device)]
        return None if len(rows) == self._num_rows else torch.tensor(rows, device=values.device), values
