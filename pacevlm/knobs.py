"""Knobs and knob spaces: one configuration of the model, and the ordered set of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pacevlm.checks import as_float, as_int, shown
from pacevlm.errors import BudgetError, ConfigError, KnobError

TIERS = ("low", "medium", "high")
# More values of a knob, or larger ones, than any model has.
MAX_VALUES, MAX_VALUE, MAX_TIER_NAME = 64, 10_000, 64
MAX_PRICE = 1000.0
"""Largest price of time, in points of accuracy per full latency; from some hundred on the cheapest knobs always win."""


class Compute(NamedTuple):
    """What stage 2 chooses: experts per token, and transformer blocks that run."""

    top_k: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Knobs:
    """One configuration: vision tier, experts per token, and transformer blocks that run."""

    tier: str
    top_k: int
    num_blocks: int

    def __str__(self) -> str:
        return f"{self.tier}/{self.top_k}/{self.num_blocks}"

    @property
    def compute(self) -> Compute:
        """What stage 2 would choose for it."""
        return Compute(self.top_k, self.num_blocks)

    @classmethod
    def parse(cls, text: str) -> Knobs:
        """Read `tier/top_k/num_blocks`, for example `high/8/16`; raises KnobError on anything else."""
        try:
            tier, top_k, num_blocks = text.split("/")
            knobs = cls(tier, int(top_k), int(num_blocks))
        except (AttributeError, TypeError, ValueError):
            knobs = None
        # What int() takes besides plain digits would be the same knobs under another name.
        if knobs is None or str(knobs) != text:
            raise KnobError(f"knobs {text!r} are not of the form tier/top_k/num_blocks, for example high/8/16")
        return knobs


@dataclass(frozen=True)
class KnobSpace:
    """The ordered product of the three knob lists, cheapest first; index and configuration map one to one.

    The index of a configuration is `(tier_index * len(top_ks) + top_k_index) * len(num_blocks) + num_blocks_index`,
    so that an array over the space reshapes to `(tiers, top_ks, num_blocks)`.

    Raises:
        KnobError: a list is empty, unsorted, repeats a value or holds more than 64, a number is not whole or outside
            1..10000, or a tier is no printable name without a slash.
    """

    tiers: tuple[str, ...] = TIERS
    top_ks: tuple[int, ...] = (4, 5, 6, 7, 8)
    num_blocks: tuple[int, ...] = (12, 13, 14, 15, 16)

    def __post_init__(self) -> None:
        # JSON and command lines give lists: fix the types once, here.
        for name in ("tiers", "top_ks", "num_blocks"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
                raise KnobError(f"{name} is {shown(values)}; it must be a list")
            object.__setattr__(self, name, tuple(values))
        for tier in self.tiers:
            named = isinstance(tier, str) and tier.strip() and tier.isprintable() and "/" not in tier
            if not named or len(tier) > MAX_TIER_NAME:
                raise KnobError(
                    f"tiers hold {str(tier)[:80]!r}; a tier must be a printable name of up to {MAX_TIER_NAME} "
                    "characters without /"
                )
        if not 0 < len(self.tiers) <= MAX_VALUES or len(set(self.tiers)) != len(self.tiers):
            raise KnobError(
                f"tiers {shown(self.tiers)} must be a non-empty list of up to {MAX_VALUES} without repetition, cheapest"
                " first"
            )
        for name in ("top_ks", "num_blocks"):
            given = getattr(self, name)
            numbers = [as_int(value) or 0 for value in given]
            ordered = bool(numbers) and numbers == sorted(set(numbers)) and len(numbers) <= MAX_VALUES
            if not ordered or numbers[0] < 1 or numbers[-1] > MAX_VALUE:
                raise KnobError(
                    f"{name} {shown(given)} must be a non-empty, strictly increasing list of up to {MAX_VALUES} whole "
                    f"numbers in 1..{MAX_VALUE}"
                )
            object.__setattr__(self, name, tuple(numbers))

    @classmethod
    def for_model(cls, tiers: Sequence[str], trained_top_k: int, num_blocks: int) -> KnobSpace:
        """Up to five values of each number: top_k from half the trained one up, num_blocks from three quarters up."""

        def spread(low: int, high: int) -> tuple[int, ...]:
            return tuple(sorted({round(low + (high - low) * i / 4) for i in range(5)}))

        return cls(
            tuple(tiers), spread(-(-trained_top_k // 2), trained_top_k), spread(-(-3 * num_blocks // 4), num_blocks)
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of values per knob: `(tiers, top_ks, num_blocks)`."""
        return len(self.tiers), len(self.top_ks), len(self.num_blocks)

    @property
    def num_stage2(self) -> int:
        """Number of `Compute` choices, the actions of stage 2."""
        return len(self.top_ks) * len(self.num_blocks)

    @property
    def full(self) -> Knobs:
        """The configuration that runs everything."""
        return Knobs(self.tiers[-1], self.top_ks[-1], self.num_blocks[-1])

    @property
    def cheapest(self) -> Knobs:
        """The configuration with every knob at its lowest value."""
        return Knobs(self.tiers[0], self.top_ks[0], self.num_blocks[0])

    def __len__(self) -> int:
        return math.prod(self.shape)

    def __iter__(self) -> Iterator[Knobs]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, knobs: object) -> bool:
        return (
            isinstance(knobs, Knobs)
            and knobs.tier in self.tiers
            and knobs.top_k in self.top_ks
            and knobs.num_blocks in self.num_blocks
        )

    def __getitem__(self, index: int) -> Knobs:
        if not 0 <= index < len(self):
            raise KnobError(f"knob index {index} is outside 0..{len(self) - 1}")
        tier_index, action = divmod(index, self.num_stage2)
        return Knobs(self.tiers[tier_index], *self.compute(action))

    def index(self, knobs: Knobs) -> int:
        """Position of a configuration; raises KnobError with the allowed values if it is not in the space."""
        if knobs not in self:
            raise KnobError(
                f"knobs {knobs} are not in this space: tier one of {self.tiers}, top_k one of {self.top_ks}, "
                f"num_blocks one of {self.num_blocks}"
            )
        tier, top_k, num_blocks = self.place(knobs)
        return (tier * len(self.top_ks) + top_k) * len(self.num_blocks) + num_blocks

    def place(self, knobs: Knobs) -> tuple[int, int, int]:
        """Where a configuration of the space stands in an array of its `shape`."""
        return self.tiers.index(knobs.tier), self.top_ks.index(knobs.top_k), self.num_blocks.index(knobs.num_blocks)

    def compute(self, index: int) -> Compute:
        """What stage-2 action `index` chooses."""
        if not 0 <= index < self.num_stage2:
            raise KnobError(f"stage-2 action {index} is outside 0..{self.num_stage2 - 1}")
        top_k_index, num_blocks_index = divmod(index, len(self.num_blocks))
        return Compute(self.top_ks[top_k_index], self.num_blocks[num_blocks_index])

    def check_model(self, *, max_top_k: int, max_num_blocks: int, min_num_blocks: int = 1) -> None:
        """Refuse values that a model cannot run.

        Args:
            max_top_k: experts per block of the model.
            max_num_blocks: transformer blocks of the model.
            min_num_blocks: blocks that always run (those up to and including the latency token's).

        Raises:
            KnobError: a top_k or num_blocks value lies outside what the model has.
        """
        bad_k = [k for k in self.top_ks if k > max_top_k]
        if bad_k:
            raise KnobError(
                f"top_k {bad_k} asked for, but the model has {max_top_k} experts per block; use 1..{max_top_k}"
            )
        bad_n = [n for n in self.num_blocks if not min_num_blocks <= n <= max_num_blocks]
        if bad_n:
            raise KnobError(
                f"num_blocks {bad_n} asked for, but the model runs {min_num_blocks}..{max_num_blocks} blocks"
            )

    def to_dict(self) -> dict[str, list[Any]]:
        """The three lists, ready for JSON."""
        return {"tiers": list(self.tiers), "top_ks": list(self.top_ks), "num_blocks": list(self.num_blocks)}

    @classmethod
    def from_dict(cls, values: dict[str, Sequence[Any]]) -> KnobSpace:
        """Inverse of `to_dict`; raises KnobError on unknown or missing keys and on anything that is no list."""
        names = ("tiers", "top_ks", "num_blocks")
        if not isinstance(values, dict) or set(values) != set(names):
            raise KnobError(f"a knob space has the keys tiers, top_ks and num_blocks, not {str(values)[:200]}")
        for name in names:
            if not isinstance(values[name], (list, tuple)):
                raise KnobError(f"{name} is {values[name]!r}; it must be a list")
        return cls(tuple(values["tiers"]), tuple(values["top_ks"]), tuple(values["num_blocks"]))


def check_budget_ms(budget_ms: object) -> float:
    """Return a budget as a float; raises BudgetError unless it is a positive, finite number of milliseconds."""
    number = as_float(budget_ms)
    if number is None or number <= 0:
        hint = "; give the number, not a text" if isinstance(budget_ms, (str, bytes)) else ""
        raise BudgetError(
            f"budget_ms is {budget_ms!r}; it must be a positive, finite number of milliseconds, for example 80{hint}"
        )
    return number


def check_price(price: object, name: str = "price") -> float:
    """Return a price of time as a float; raises ConfigError unless it is a number of points from 0 to `MAX_PRICE`.

    Args:
        name: what the price is called, for the message.
    """
    number = as_float(price)
    if number is None or not 0 <= number <= MAX_PRICE:
        raise ConfigError(
            f"{name} is {shown(price)}; it must be a number from 0 to {MAX_PRICE:g}, the points of accuracy that a "
            "whole full latency is worth"
        )
    return number
