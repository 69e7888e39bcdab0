"""Which blocks run at each num_blocks: nested sets, stored beside the weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pacevlm.errors import KnobError


@dataclass(frozen=True)
class BlockOrder:
    """The order in which blocks are given up.

    Attributes:
        num_blocks: blocks of the checkpoint.
        removal: blocks from the first to be dropped to the last; block 0 is never among them.
        source: how the order came about: `importance` (measured), the name of another measured one, or `early_exit`
            (the last blocks go first).

    Raises:
        KnobError: a block is named twice, lies outside the model, or is block 0.
    """

    num_blocks: int
    removal: tuple[int, ...]
    source: str = "importance"

    def __post_init__(self) -> None:
        object.__setattr__(self, "removal", tuple(int(b) for b in self.removal))
        if len(set(self.removal)) != len(self.removal) or any(not 0 < b < self.num_blocks for b in self.removal):
            raise KnobError(
                f"removal order {self.removal} must name blocks of 1..{self.num_blocks - 1}, each at most once"
            )

    @classmethod
    def early_exit(cls, num_blocks: int, fixed_blocks: Collection[int] = ()) -> BlockOrder:
        """Plain early exit: the last blocks go first, but for fixed ones."""
        return cls(num_blocks, tuple(b for b in range(num_blocks - 1, 0, -1) if b not in fixed_blocks), "early_exit")

    def kept(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that run, ascending; raises KnobError if the order is too short for so few blocks."""
        dropped = self.num_blocks - num_blocks
        if not 0 <= dropped <= len(self.removal):
            raise KnobError(
                f"num_blocks {num_blocks} asked for; this order knows {self.num_blocks - len(self.removal)} to "
                f"{self.num_blocks}; measure a longer one with `pacevlm importance`"
            )
        gone = set(self.removal[:dropped])
        return tuple(b for b in range(self.num_blocks) if b not in gone)

    def check_space(
        self, num_blocks: Sequence[int], stage2_after: int, fixed_blocks: Collection[int] = frozenset()
    ) -> None:
        """Refuse knob values that would drop a block at or before the latency token's, or one that has to run."""
        dropped = self.removal[: self.num_blocks - min(num_blocks)]
        fixed = [b for b in dropped if b in fixed_blocks]
        if fixed:
            raise KnobError(
                f"num_blocks {min(num_blocks)} would drop blocks {fixed}, which this family cannot leave out; raise "
                "num_blocks, or measure the order anew"
            )
        early = [b for b in dropped if b < stage2_after]
        if early:
            raise KnobError(
                f"num_blocks {min(num_blocks)} would drop blocks {early}, but the first {stage2_after} blocks always "
                "run, before stage 2; raise num_blocks or lower stage2_after"
            )
