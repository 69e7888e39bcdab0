"""The three parts of a data set: what is learned from, what calibrates, and what judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from pacevlm.config import DataConfig, PictureConfig
from pacevlm.data.digits import DigitVQA
from pacevlm.data.jsonl import JsonlDataset
from pacevlm.errors import DataError
from pacevlm.types import Example

# Of a file without a test file beside it, at most these shares are set aside.
MAX_TEST_SHARE, MAX_VAL_SHARE = 0.2, 0.1


class Subset(Sequence[Example]):
    """Some examples of a data set.

    Args:
        dataset: the whole data set.
        indices: places in it.
        keep: whether examples are kept once made, for data sets that are small and slow to make.
        id_prefix: put in front of every example's id.
    """

    def __init__(
        self, dataset: Sequence[Example], indices: Sequence[int], *, keep: bool = False, id_prefix: str = ""
    ) -> None:
        self.dataset = dataset
        self.indices = tuple(int(index) for index in indices)
        self.keep, self.id_prefix = keep, id_prefix
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
        if place in self._made:
            return self._made[place]
        example = self.dataset[place]
        if self.id_prefix:
            example = dataclasses.replace(example, example_id=self.id_prefix + example.example_id)
        if self.keep:
            self._made[place] = example
        return example


@dataclass(frozen=True)
class Splits:
    """A data set in three parts.

    Attributes:
        name: of the data set, for reports.
        train: to learn from.
        val: to calibrate on.
        test: to judge on.
    """

    name: str
    train: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]


def load_splits(config: DataConfig, picture: PictureConfig | None = None) -> Splits:
    """Open a data set and divide it; examples of a test file get `test:` in front of their ids, to stay apart.

    Args:
        config: which data set, and how it is divided.
        picture: how the pictures of files are read.

    Raises:
        DataError: a file is missing or malformed, or has too few examples to be divided.
    """
    if config.dataset == "digits":
        places = {
            "train": range(config.num_train),
            "val": range(config.num_val),
            "test": range(config.skip_test, config.skip_test + config.num_test),
        }
        parts = {
            split: Subset(DigitVQA(split, indices.stop, seed=config.seed), indices, keep=True)
            for split, indices in places.items()
        }
        return Splits("digits", **parts)
    dataset = JsonlDataset(config.dataset, picture)
    order = np.random.default_rng(config.seed).permutation(len(dataset)).tolist()
    num_val = min(config.num_val, int(MAX_VAL_SHARE * len(dataset)))
    val = Subset(dataset, order[:num_val])
    if config.test_dataset:
        test_dataset = JsonlDataset(config.test_dataset, picture)
        test = Subset(test_dataset, range(config.skip_test, len(test_dataset))[: config.num_test], id_prefix="test:")
        behind = num_val
    else:
        behind = num_val + min(config.skip_test + config.num_test, int(MAX_TEST_SHARE * len(dataset)))
        test = Subset(dataset, order[num_val + config.skip_test : behind])
    if not val or not test:
        raise DataError(
            f"{config.dataset} holds {len(dataset)} examples, too few to be divided; give at least "
            f"{round(1 / MAX_VAL_SHARE)}"
        )
    return Splits(dataset.path.name, Subset(dataset, order[behind:][: config.num_train]), val, test)
