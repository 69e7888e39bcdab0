"""How far groups of questions agree on which blocks matter: rank correlations with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from pacevlm.evaluation.statistics import Interval, percentile_interval, resampled_means


@dataclass(frozen=True)
class GroupOrder:
    """One group's own order of blocks, and how far it agrees with that of all questions, its own included.

    Attributes:
        name: of the group.
        num_examples: its questions.
        order: blocks by the accuracy that the group loses without each alone, the cheapest first.
        correlation: Spearman's, of what the group loses without each block and what all questions lose, with its 95 %
            interval over resampled questions; None where either loses the same without every block.
        drawn: the same of as many questions drawn from all at random, their mean and where 95 % of the draws lie: what
            the group would agree by if it were like the others.
    """

    name: str
    num_examples: int
    order: tuple[int, ...]
    correlation: Interval | None
    drawn: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "name": self.name,
            "num_examples": self.num_examples,
            "order": list(self.order),
            "correlation": None if self.correlation is None else self.correlation.to_dict(),
            "drawn": None if self.drawn is None else self.drawn.to_dict(),
        }


def compare_orders(
    lost: Mapping[int, ArrayLike], groups: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[GroupOrder, ...]:
    """Every group's own order, by name; empty if all questions are of one group.

    Noise alone lowers a correlation, in the group and in its resamples, so the interval may lie below the estimate, and
    a small group agrees less. `drawn` is what tells a group that differs from a small one.

    Args:
        lost: by block, what every question loses without it, `(examples,)`.
        groups: one name per question.
        num_resamples: of each interval.
        seed: of the resamples and draws.
    """
    blocks = list(lost)
    table = np.stack([np.asarray(lost[block], dtype=np.float64) for block in blocks], axis=1)
    labels = np.array(groups)
    names = sorted(set(groups))
    if len(names) < 2:
        return ()
    # A resample takes the questions of all groups together. Ranks do not mind that a group's sums are no means.
    inside = [table * (labels == name)[:, None] for name in names]
    resamples = resampled_means(np.concatenate([table, *inside], axis=1), num_resamples=num_resamples, seed=seed)
    everything, *of_groups = np.split(resamples, len(names) + 1, axis=1)
    found = []
    for name, resampled in zip(names, of_groups, strict=True):
        own, number = table[labels == name].mean(axis=0), int((labels == name).sum())
        rng = np.random.default_rng([seed, number])
        drawn = [table[rng.choice(len(table), number, replace=False)].mean(axis=0) for _ in range(num_resamples)]
        chance = _finite(rank_correlations(drawn, np.broadcast_to(table.mean(axis=0), (num_resamples, len(blocks)))))
        (estimate,) = rank_correlations([own], [table.mean(axis=0)])
        again = _finite(rank_correlations(resampled, everything))
        found.append(
            GroupOrder(
                name,
                number,
                tuple(blocks[place] for place in np.argsort(_rounded(own), kind="stable")),
                percentile_interval(float(estimate), again) if np.isfinite(estimate) and len(again) else None,
                percentile_interval(float(chance.mean()), chance) if len(chance) else None,
            )
        )
    return tuple(found)


def rank_correlations(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Spearman's correlation of each row of one table with that of another, `(rows,)`; NaN where a row is constant."""
    ranks = [rankdata(_rounded(rows), axis=1) for rows in (first, second)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    products: NDArray[np.float64] = (a * b).sum(axis=1)
    return np.where(scale > 0, products / np.where(scale > 0, scale, 1.0), np.nan)


def _rounded(values: ArrayLike) -> NDArray[np.float64]:
    # Equal losses that were added up in another order are ties.
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return array.round(12)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]
