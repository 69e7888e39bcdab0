"""Measured importance of blocks: the accuracy lost without each, and greedily without sets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacevlm.data.metrics import Metric
from pacevlm.errors import ConfigError, DataError
from pacevlm.evaluation.statistics import Interval, percentile_interval, resampled_means
from pacevlm.knobs import KnobSpace
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.elastic import ElasticModel, write_elastic_settings
from pacevlm.partial import PartialFile
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example

Scores = NDArray[np.float64]

# Enough for the ends of a 95 % interval to two digits, at a hundred sets of a thousand examples within seconds.
NUM_RESAMPLES = 2000
# Examples whose scores are kept as soon as they are known.
CHUNK = 64


@dataclass(frozen=True)
class BlockSetFigure:
    """What the model scores without a set of blocks.

    Attributes:
        removed: the blocks left out, in the order in which they were given up.
        accuracy: mean accuracy with its 95 % interval.
        accuracy_lost: accuracy of all blocks less this one, on the same examples, with its 95 % interval.
    """

    removed: tuple[int, ...]
    accuracy: Interval
    accuracy_lost: Interval

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "removed": list(self.removed),
            "accuracy": self.accuracy.to_dict(),
            "accuracy_lost": self.accuracy_lost.to_dict(),
        }


@dataclass(frozen=True)
class ImportanceResult:
    """An order in which to give up blocks, and what it rests on.

    Attributes:
        removal: blocks from the first to be dropped to the last.
        num_examples: examples that every set was scored on.
        full: the figure of all blocks.
        single: leave-one-out figures of every block that may go, by block.
        greedy: the figure after each removal, in order.
    """

    removal: tuple[int, ...]
    num_examples: int
    full: BlockSetFigure
    single: tuple[BlockSetFigure, ...]
    greedy: tuple[BlockSetFigure, ...]

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "num_examples": self.num_examples,
            "full": self.full.to_dict(),
            "single": [figure.to_dict() for figure in self.single],
            "greedy": [figure.to_dict() for figure in self.greedy],
        }

    def save(self, folder: str | Path, measured_on: str) -> None:
        """Store the order and its figures in a model directory's `elastic.json`; raises StorageError.

        Args:
            measured_on: what the examples were, for readers: `digits, validation split, seed 0`.
        """
        write_elastic_settings(
            Path(folder), removal=list(self.removal), importance=self.to_dict(), measured_on=measured_on
        )


class _WithoutBlocks(RolloutEngine):
    """An engine of the same model without some blocks; looks and prefixes, which do not depend on them, are shared."""

    def __init__(self, base: RolloutEngine, removed: tuple[int, ...]) -> None:
        model = base.model
        num_blocks = model.adapter.num_blocks
        space = KnobSpace((model.knob_space.tiers[-1],), (model.adapter.trained_top_k,), (num_blocks - len(removed),))
        variant = ElasticModel(
            model.adapter,
            space,
            model.vision_budgets,
            BlockOrder(num_blocks, removed),
            f"{model.identity} without {','.join(map(str, removed)) or 'none'}",
            stage2_after=model.stage2_after,
            max_new_tokens=model.max_new_tokens,
            picture_config=model.picture_config,
        )
        limits = base.limits
        super().__init__(variant, base.metric, max_rows=limits.max_rows, max_tokens=limits.max_tokens)
        self._views, self._prefixes = base._views, base._prefixes

    def scores(self, examples: Sequence[Example]) -> list[float]:
        """Score of each example."""
        return [
            outcome.accuracy for outcome in self.run([(example, self.model.knob_space.full) for example in examples])
        ]


def measure_importance(
    model: ElasticModel,
    examples: Sequence[Example],
    min_num_blocks: int = 8,
    *,
    num_candidates: int = 6,
    metric: Metric | None = None,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    partial_path: Path | None = None,
) -> ImportanceResult:
    """Find the order in which giving up blocks costs the least accuracy.

    Every block behind stage 2 is left out alone first, and the one that costs least goes. From then on, each round
    tries the `num_candidates` remaining blocks that cost least when they were last tried, each together with all that
    went before, and gives up the best. Of equal ones the block goes that cost least alone, then the lower one.

    The model runs at its highest tier and trained top_k and really answers; its own block order plays no part.

    Method: greedy backward elimination over leave-one-out accuracy (as Men et al., "ShortGPT", 2024, but scored by the
    task instead of hidden-state similarity, and for sets).

    Args:
        examples: validation examples, the same for every set.
        min_num_blocks: the removal order ends where so many blocks are left.
        num_candidates: blocks tried per round after the first.
        metric: scores the answers; exact match if None.
        max_rows, max_tokens: most rows, and most prompt tokens, in a batch; as much as fits if None.
        progress: called with (sets measured, sets to measure).
        partial_path: file to which scores are appended, and from which an interrupted measurement of the same model
            and examples goes on. The caller removes it once the result is stored.

    Raises:
        ConfigError: a number is outside its range.
        DataError: there are no examples, or two have the same id; or the partial file is damaged.
        StorageError: scores could not be appended.
    """
    num_blocks, first = model.adapter.num_blocks, model.stage2_after
    least = max(first, len(model.adapter.fixed_blocks | set(range(first))))
    if not least <= min_num_blocks < num_blocks:
        raise ConfigError(f"min_num_blocks is {min_num_blocks}; it must be {least}..{num_blocks - 1}")
    if num_candidates < 1:
        raise ConfigError(f"num_candidates is {num_candidates}; it must be a whole number from 1")
    ids = {example.example_id for example in examples}
    if not ids or len(ids) != len(examples):
        raise DataError(
            f"{len(examples)} examples with {len(ids)} different ids given; importance needs at least one example, and "
            "ids of their own"
        )
    base = RolloutEngine(model, metric, max_rows=max_rows, max_tokens=max_tokens)
    blocks = [block for block in range(first, num_blocks) if block not in model.adapter.fixed_blocks]
    num_removed = num_blocks - min_num_blocks
    num_sets = 1 + len(blocks) + sum(min(num_candidates, len(blocks) - i) for i in range(1, num_removed))
    num_measured = 0
    header = {
        "model_identity": model.identity,
        "metric": base.metric_name,
        "examples": [[example.example_id, example.content_id, list(example.references)] for example in examples],
    }
    partial = PartialFile(partial_path, header, "interrupted measurement of importance")
    known = _read_scores(partial, len(examples))

    def measure(removed: tuple[int, ...]) -> Scores:
        nonlocal num_measured
        scores = known.setdefault(removed, [])
        engine = _WithoutBlocks(base, removed) if len(scores) < len(examples) else None
        while engine is not None and len(scores) < len(examples):
            scores += engine.scores(examples[len(scores) : len(scores) + CHUNK])
            partial.append({"removed": list(removed), "scores": scores})
        num_measured += 1
        if progress is not None:
            progress(num_measured, num_sets)
        return np.array(scores)

    search = choose_removal(measure, blocks, num_removed, num_candidates=num_candidates)
    return ImportanceResult(
        removal=search.removal,
        num_examples=len(examples),
        full=_figure((), search.full, search.full),
        single=tuple(_figure((block,), scores, search.full) for block, scores in search.single.items()),
        greedy=tuple(_figure(search.removal[: i + 1], scores, search.full) for i, scores in enumerate(search.greedy)),
    )


def _read_scores(partial: PartialFile, num_examples: int) -> dict[tuple[int, ...], list[float]]:
    """By the blocks left out, the scores of the first examples that an interrupted measurement left."""

    def read(record: dict[str, Any]) -> tuple[tuple[int, ...], list[float]]:
        scores = [float(score) for score in record["scores"]]
        if len(scores) > num_examples or not all(0 <= score <= 1 for score in scores):
            raise ValueError("these are no scores of these examples")
        return tuple(map(int, record["removed"])), scores

    return dict(partial.read(read))


@dataclass(frozen=True, eq=False)
class RemovalSearch:
    """A greedy search's outcome: the order, and the scores of all blocks, without each one, and after each removal."""

    removal: tuple[int, ...]
    full: Scores
    single: dict[int, Scores]
    greedy: tuple[Scores, ...]


def choose_removal(
    measure: Callable[[tuple[int, ...]], Scores], blocks: Sequence[int], num_removed: int, *, num_candidates: int
) -> RemovalSearch:
    """The greedy search of `measure_importance` over any scores.

    Args:
        measure: scores of each example without the given blocks, `(examples,)`.
        blocks: those that may go.
        num_removed: how many go.
        num_candidates: blocks tried per round after the first.
    """
    full = measure(())
    single = {block: measure((block,)) for block in blocks}
    lost_alone = {block: _mean_lost(full, scores) for block, scores in single.items()}
    lost_last = dict(lost_alone)  # by a block's removal, on top of what was gone when it was last tried
    removed: tuple[int, ...] = ()
    tried, greedy = single, [full]
    for _ in range(num_removed):
        if removed:
            remaining = [block for block in blocks if block not in removed]
            candidates = sorted(remaining, key=lambda block: (lost_last[block], lost_alone[block], block))
            tried = {block: measure((*removed, block)) for block in candidates[:num_candidates]}
            lost_last |= {block: _mean_lost(greedy[-1], scores) for block, scores in tried.items()}
        best = min(tried, key=lambda block: (lost_last[block], lost_alone[block], block))
        removed = (*removed, best)
        greedy.append(tried[best])
    return RemovalSearch(removed, full, single, tuple(greedy[1:]))


def _mean_lost(before: Scores, after: Scores) -> float:
    # Rounded, so that equal losses that were added up in another order stay equal.
    return round(float(np.mean(before - after)), 12)


def _figure(removed: tuple[int, ...], accuracy: Scores, full: Scores) -> BlockSetFigure:
    columns = np.stack([accuracy, full - accuracy], axis=1)
    resamples = resampled_means(columns, num_resamples=NUM_RESAMPLES)
    means = columns.mean(axis=0)
    return BlockSetFigure(
        removed=removed,
        accuracy=percentile_interval(float(means[0]), resamples[:, 0]),
        accuracy_lost=percentile_interval(float(means[1]), resamples[:, 1]),
    )
