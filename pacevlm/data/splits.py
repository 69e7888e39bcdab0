"""The three parts of a data set: what is learned from, what calibrates, and what judges. They share no picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from pacevlm.config import DataConfig, PictureConfig
from pacevlm.data.digit_tasks import load_digits
from pacevlm.data.division import Progress, divide
from pacevlm.data.metrics import Metric, common_metric, load_metric
from pacevlm.mixture import parse_mixture
from pacevlm.types import Example

# The data sets inside the package: a part's examples, given its name, how many there are, the mixture and the seed.
MADE: dict[str, Callable[[str, int, str | None, int], Sequence[Example]]] = {"digits": load_digits}
# Skipped lines that a remark lists; `Splits.skipped` holds all of them.
NUM_LISTED = 20


class _Made(Sequence[Example]):
    """Some examples of a data set that is small and slow to make, each made once, when it is wanted.

    Args:
        dataset: the whole data set.
        indices: places in it.
    """

    def __init__(self, dataset: Sequence[Example], indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self._made: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self.indices[index]
        if place not in self._made:
            self._made[place] = self.dataset[place]
        return self._made[place]


@dataclass(frozen=True)
class Splits:
    """A data set in three parts that share no picture.

    Attributes:
        name: of the data set, for reports.
        metric: scores its answers.
        train: to learn from.
        val: to calibrate on.
        test: to judge on.
        notes: sentences on examples that are in no part, and why.
        skipped: what was wrong with each line whose picture could not be read.
        made_from: what examples follow from, by part, where they are made and not read; otherwise None.
    """

    name: str
    metric: Metric
    train: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    made_from: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know: the notes, and how many lines were skipped, with the first of them."""
        if not self.skipped:
            return self.notes
        count = f"{len(self.skipped)} line{'s' if len(self.skipped) > 1 else ''} left out, whose picture cannot be read"
        shown = "; ".join(self.skipped[:NUM_LISTED])
        return (*self.notes, f"{count}: {shown}{'; ...' if len(self.skipped) > NUM_LISTED else ''}")

    @cached_property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What tells each part from any other, by its name and ready for JSON; the order of lines plays no part.

        Content, references and options count, and of test examples also the ids and metadata that reports show.
        """
        if self.made_from is not None:
            return {part: dict(facts) for part, facts in self.made_from.items()}
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {part: _identity(examples, with_rows=part == "test") for part, examples in parts.items()}


def _identity(examples: Sequence[Example], *, with_rows: bool) -> dict[str, Any]:
    digests = []
    for example in examples:
        facts: list[Any] = [example.content_id, example.references, example.choices]
        facts += [example.metric] if example.metric is not None else []
        facts += [example.example_id, example.metadata] if with_rows else []
        digests.append(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    return {"num_examples": len(examples), "sha256": hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()}


def load_splits(
    config: DataConfig, picture_config: PictureConfig | None = None, progress: Progress | None = None
) -> Splits:
    """Open data sets and divide them.

    Data sets inside the package have parts of their own. How others are divided: see `divide`.

    Args:
        config: which data sets, and how they are divided.
        picture_config: how pictures of files are read; the defaults if None.
        progress: called while rows of a published data set are read.

    Raises:
        ConfigError: there is no such metric, or the library that reads a data set is missing.
        DataError: a data set is missing or malformed, cannot be reached, has too few pictures to be divided, or does
            not suit the metric.
        ImageError: a picture cannot be read; the message names file and line.
    """
    metric = load_metric(config.metric or "exact_match")
    if config.dataset not in MADE:
        division = divide(config, picture_config, progress)
        examples = (*division.train, *division.val, *division.test)
        for example in examples:
            metric.check(example)
        return Splits(
            division.name,
            common_metric(metric.of(example) for example in examples),
            division.train,
            division.val,
            division.test,
            division.notes,
            division.skipped,
        )
    places = {
        "train": range(config.num_train),
        "val": range(config.num_val),
        "test": range(config.skip_test, config.skip_test + config.num_test),
    }
    make = MADE[config.dataset]
    parts = {
        part: _Made(make(part, indices.stop, config.mixture, config.seed), indices) for part, indices in places.items()
    }
    mixture = parse_mixture(config.mixture)
    # What was made before there were tasks is named as it was, so that its runs go on.
    name = f"{config.dataset}-{mixture.name}" if mixture.weights else config.dataset
    made_from = {
        part: {"dataset": name, "seed": config.seed, "first": indices.start, "num_examples": len(indices)}
        for part, indices in places.items()
    }
    if metric.needs_choices:
        metric.check(parts["train"][0])
    return Splits(name, metric, parts["train"], parts["val"], parts["test"], made_from=made_from)
