"""Measured importance of blocks: the accuracy lost without each, and greedily without sets of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.data.metrics import Metric
from pacevlm.errors import ConfigError, DataError
from pacevlm.evaluation.agreement import GroupOrder, compare_orders
from pacevlm.evaluation.statistics import Interval, percentile_interval, resampled_means
from pacevlm.models.elastic import ElasticModel, store_block_order
from pacevlm.models.prefix_tree import PrefixTree
from pacevlm.partial import PartialFile
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.outcome_store import StoredAnswer
from pacevlm.rollout.ranks import Ranks, RowKey
from pacevlm.types import Example

Scores = NDArray[np.float64]
# Blocks that are left out, in the order in which they were given up.
BlockSet = tuple[int, ...]

# Enough for the ends of a 95 % interval to two digits, at a hundred sets of a thousand examples within seconds.
NUM_RESAMPLES = 2000
# Examples whose scores are kept as soon as they are known, of all sets of a round: half a minute at MolmoE-1B's size.
CHUNK = 32


@dataclass(frozen=True)
class BlockSetFigure:
    """What the model scores without a set of blocks.

    Attributes:
        removed: the blocks left out, in the order in which they were given up.
        accuracy: mean accuracy with its 95 % interval.
        accuracy_lost: accuracy of all blocks less this one, on the same examples, with its 95 % interval.
    """

    removed: BlockSet
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
        groups: every group's own order, and how far it agrees with that of all; empty where there are no two.
    """

    removal: BlockSet
    num_examples: int
    full: BlockSetFigure
    single: tuple[BlockSetFigure, ...]
    greedy: tuple[BlockSetFigure, ...]
    groups: tuple[GroupOrder, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            "num_examples": self.num_examples,
            "full": self.full.to_dict(),
            "single": [figure.to_dict() for figure in self.single],
            "greedy": [figure.to_dict() for figure in self.greedy],
            "groups": [group.to_dict() for group in self.groups],
        }

    def save(self, folder: str | Path, measured_on: str, name: str | None = None) -> None:
        """Store the order and its figures in a model directory's `elastic.json`; raises StorageError.

        Args:
            measured_on: what the examples were, for readers: `digits, validation split, seed 0`.
            name: what a knob space calls the order; None makes it the one of `importance`.
        """
        store_block_order(
            Path(folder), name, removal=list(self.removal), importance=self.to_dict(), measured_on=measured_on
        )


# What it takes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportancePlan:
    """What measuring an order takes, known beforehand.

    A block pass is one block run over one prompt; sets of blocks share those in front of the first block on which they
    disagree.

    Attributes:
        num_examples: examples that every set answers.
        min_num_blocks: blocks that are left in the end.
        num_sets: sets of blocks in each round; the first tries all blocks, and to do without each.
        num_passes: block passes of each round for one example. Which sets later rounds try is not known before: this is
            the most that they may take. What shares no batch shares no pass, which costs a little more.
        num_passes_alone: the same if every set ran by itself.
    """

    num_examples: int
    min_num_blocks: int
    num_sets: tuple[int, ...]
    num_passes: tuple[int, ...]
    num_passes_alone: tuple[int, ...]

    @property
    def num_answers(self) -> int:
        """Answers of all sets to all examples."""
        return self.num_examples * sum(self.num_sets)


def plan_importance(
    num_blocks: int,
    fixed_blocks: Collection[int],
    num_examples: int,
    min_num_blocks: int,
    num_candidates: int,
    stage2_after: int = 1,
) -> ImportancePlan:
    """What `measure_importance` will run.

    Raises:
        ConfigError: a number is outside its range.
    """
    blocks = _removable(num_blocks, fixed_blocks, stage2_after)
    least = num_blocks - len(blocks)
    if not least <= min_num_blocks < num_blocks:
        raise ConfigError(f"min_num_blocks is {min_num_blocks}; it must be {least}..{num_blocks - 1}")
    if num_candidates < 1:
        raise ConfigError(f"num_candidates is {num_candidates}; it must be a whole number from 1")
    rounds: list[list[BlockSet]] = [[(), *((block,) for block in blocks)]]
    for num_removed in range(1, num_blocks - min_num_blocks):
        # Candidates share least where they come first.
        gone, left = tuple(blocks[-num_removed:]), blocks[:-num_removed]
        rounds.append([(*gone, block) for block in left[:num_candidates]])
    return ImportancePlan(
        num_examples,
        min_num_blocks,
        tuple(len(sets) for sets in rounds),
        tuple(count_passes(sets, num_blocks, stage2_after) for sets in rounds),
        tuple(sum(num_blocks - stage2_after - len(removed) for removed in sets) for sets in rounds),
    )


def count_passes(sets: Sequence[BlockSet], num_blocks: int, stage2_after: int = 1) -> int:
    """Blocks that run over a prompt which sets of blocks share."""
    tree = PrefixTree([None] * len(sets), [frozenset(range(num_blocks)).difference(gone) for gone in sets])
    x, count = torch.empty(len(tree.branches)), 0
    for block in range(stage2_after, num_blocks):
        x, members = tree.split(block, x)
        count += len(tree.branches) if members is None else len(members)
    return count


def _removable(num_blocks: int, fixed_blocks: Collection[int], stage2_after: int) -> list[int]:
    return [block for block in range(stage2_after, num_blocks) if block not in fixed_blocks]


# Measuring -----------------------------------------------------------------------------------------------------------


def _score(engine: RolloutEngine, examples: Sequence[Example], sets: Sequence[BlockSet]) -> list[list[float]]:
    """Scores of each example without each set, at the highest tier and the trained top_k."""
    answers: dict[RowKey, str] = {}

    def keep(keys: Sequence[RowKey], given: Sequence[StoredAnswer]) -> None:
        answers.update({key: answer.answer for key, answer in zip(keys, given, strict=True)})

    for _ in engine.answer({(example.content_id, gone): example for example in examples for gone in sets}, keep):
        pass
    return [[engine.metric(answers[example.content_id, gone], example) for example in examples] for gone in sets]


def measure_importance(
    model: ElasticModel,
    examples: Sequence[Example],
    min_num_blocks: int = 8,
    *,
    num_candidates: int = 6,
    groups: Sequence[str] | None = None,
    metric: Metric | None = None,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    partial_path: Path | None = None,
    ranks: Ranks | None = None,
) -> ImportanceResult:
    """Find the order in which giving up blocks costs the least accuracy.

    Every block behind stage 2 is left out alone first, and the one that costs least goes. From then on, each round
    tries the `num_candidates` remaining blocks that cost least when they were last tried, each together with all that
    went before, and gives up the best. Of equal ones the block goes that cost least alone, then the lower one.

    The model runs at its highest tier and trained top_k and really answers; its own block order plays no part. The sets
    of a round run together and share what they have in common of a prompt's blocks.

    Method: greedy backward elimination over leave-one-out accuracy (as Men et al., "ShortGPT", 2024, but scored by the
    task instead of hidden-state similarity, and for sets).

    Args:
        examples: validation examples, the same for every set.
        min_num_blocks: the removal order ends where so many blocks are left.
        num_candidates: blocks tried per round after the first.
        groups: each example's group, whose own orders are compared with that of all.
        metric: scores the answers; exact match if None.
        max_rows, max_tokens: most rows, and most prompt tokens, in a batch; as much as fits if None.
        progress: called with (block passes done, to do), as `plan_importance` counts them.
        partial_path: file to which scores are appended, and from which an interrupted measurement of the same model
            and examples goes on. The caller removes it once the result is stored.
        ranks: other processes that were told to load the same model.

    Raises:
        ConfigError: a number is outside its range.
        DataError: there are no examples, or two have the same id; or the partial file is damaged.
        StorageError: scores could not be appended.
    """
    num_blocks, first = model.adapter.num_blocks, model.stage2_after
    plan = plan_importance(
        num_blocks, model.adapter.fixed_blocks, len(examples), min_num_blocks, num_candidates, stage2_after=first
    )
    ids = {example.example_id for example in examples}
    if not ids or len(ids) != len(examples):
        raise DataError(
            f"{len(examples)} examples with {len(ids)} different ids given; importance needs at least one example, and "
            "ids of their own"
        )
    engine = RolloutEngine(model, metric, max_rows=max_rows, max_tokens=max_tokens, ranks=ranks)
    header = {
        "schema_version": 2,
        "model_identity": model.identity,
        "metric": engine.metric_name,
        "examples": [[example.example_id, example.content_id, list(example.references)] for example in examples],
    }
    partial = PartialFile(partial_path, header, "interrupted measurement of importance")
    known = _read_scores(partial, len(examples))
    planned = iter(plan.num_passes)
    num_done, num_total = 0, plan.num_examples * sum(plan.num_passes)

    def measure(sets: list[BlockSet]) -> list[Scores]:
        nonlocal num_done
        num_passes = next(planned)
        unfinished = [removed for removed in sets if len(known[removed]) < len(examples)]
        start = min((len(known[removed]) for removed in unfinished), default=len(examples))
        for place in range(start, len(examples) + 1, CHUNK):
            if progress is not None:
                progress(num_done + place * num_passes, num_total)
            part = examples[place : place + CHUNK]
            if not part:
                break
            scores = _score(engine, part, unfinished)
            partial.append({"first": place, "removed": unfinished, "scores": scores})
            for removed, new in zip(unfinished, scores, strict=True):
                known[removed] = known[removed][:place] + new
        num_done += len(examples) * num_passes
        return [np.array(known[removed]) for removed in sets]

    blocks = _removable(num_blocks, model.adapter.fixed_blocks, first)
    search = choose_removal(measure, blocks, num_blocks - min_num_blocks, num_candidates=num_candidates)
    if progress is not None:
        progress(num_total, num_total)
    lost = {block: search.full - scores for block, scores in search.single.items()}
    return ImportanceResult(
        removal=search.removal,
        num_examples=len(examples),
        full=_figure((), search.full, search.full),
        single=tuple(_figure((block,), scores, search.full) for block, scores in search.single.items()),
        greedy=tuple(_figure(search.removal[: i + 1], scores, search.full) for i, scores in enumerate(search.greedy)),
        groups=() if groups is None else compare_orders(lost, groups, num_resamples=NUM_RESAMPLES),
    )


def _read_scores(partial: PartialFile, num_examples: int) -> defaultdict[BlockSet, list[float]]:
    """By the blocks left out, the scores of the first examples that an interrupted measurement left."""
    known: defaultdict[BlockSet, list[float]] = defaultdict(list)

    def read(record: dict[str, Any]) -> None:
        place = int(record["first"])
        for removed, new in zip(record["removed"], record["scores"], strict=True):
            key, scores = tuple(map(int, removed)), [float(score) for score in new]
            is_next = 0 <= place <= len(known[key]) and place + len(scores) <= num_examples
            if not is_next or not all(0 <= score <= 1 for score in scores):
                raise ValueError("these are no scores of these examples")
            known[key] = known[key][:place] + scores

    partial.read(read)
    return known


@dataclass(frozen=True, eq=False)
class RemovalSearch:
    """A greedy search's outcome: the order, and the scores of all blocks, without each one, and after each removal."""

    removal: BlockSet
    full: Scores
    single: dict[int, Scores]
    greedy: tuple[Scores, ...]


def choose_removal(
    measure: Callable[[list[BlockSet]], list[Scores]], blocks: Sequence[int], num_removed: int, *, num_candidates: int
) -> RemovalSearch:
    """The greedy search of `measure_importance` over any scores.

    Args:
        measure: scores of each example without each of the given sets of blocks, `(examples,)`; called once a round.
        blocks: those that may go.
        num_removed: how many go.
        num_candidates: blocks tried per round after the first.
    """
    full, *alone = measure([(), *((block,) for block in blocks)])
    single = dict(zip(blocks, alone, strict=True))
    lost_alone = {block: _mean_lost(full, scores) for block, scores in single.items()}
    lost_last = dict(lost_alone)  # by a block's removal, on top of what was gone when it was last tried
    removed: BlockSet = ()
    tried, greedy = single, [full]
    for _ in range(num_removed):
        if removed:
            remaining = [block for block in blocks if block not in removed]
            candidates = sorted(remaining, key=lambda block: (lost_last[block], lost_alone[block], block))
            candidates = candidates[:num_candidates]
            tried = dict(zip(candidates, measure([(*removed, block) for block in candidates]), strict=True))
            lost_last |= {block: _mean_lost(greedy[-1], scores) for block, scores in tried.items()}
        best = min(tried, key=lambda block: (lost_last[block], lost_alone[block], block))
        removed = (*removed, best)
        greedy.append(tried[best])
    return RemovalSearch(removed, full, single, tuple(greedy[1:]))


def _mean_lost(before: Scores, after: Scores) -> float:
    # Rounded, so that equal losses that were added up in another order stay equal.
    return round(float(np.mean(before - after)), 12)


def _figure(removed: BlockSet, accuracy: Scores, full: Scores) -> BlockSetFigure:
    columns = np.stack([accuracy, full - accuracy], axis=1)
    resamples = resampled_means(columns, num_resamples=NUM_RESAMPLES)
    means = columns.mean(axis=0)
    return BlockSetFigure(
        removed=removed,
        accuracy=percentile_interval(float(means[0]), resamples[:, 0]),
        accuracy_lost=percentile_interval(float(means[1]), resamples[:, 1]),
    )
