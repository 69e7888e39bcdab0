"""Dividing data sets by the content of their pictures, so that no picture is in two parts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pacevlm.config import DataConfig
from pacevlm.data.benchmarks import BENCHMARKS
from pacevlm.data.jsonl import PARTS
from pacevlm.data.readers import FileReader, Line, PublishedReader
from pacevlm.dataset_list import DatasetEntry, dataset_shares, parse_datasets
from pacevlm.errors import DataError
from pacevlm.images import PictureConfig
from pacevlm.types import Example

TEST_SHARE, VAL_SHARE = 0.2, 0.1

# Called with the number of examples found and of those wanted.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Division:
    """Examples of data sets in three parts; see `Splits`."""

    name: str
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def part_of(picture_id: str, seed: int) -> str:
    """The part that a picture belongs to: a fifth to test, a tenth to val, the rest to train.

    It follows from the pixels and the seed alone, so that data sets which are mixed or streamed agree on it.
    """
    digest = hashlib.sha256(f"{seed} {picture_id}".encode()).hexdigest()
    place = int(digest[:13], 16) / 16**13
    return "test" if place < TEST_SHARE else "val" if place < TEST_SHARE + VAL_SHARE else "train"


def divide(
    config: DataConfig, picture_config: PictureConfig | None = None, progress: Progress | None = None
) -> Division:
    """Read the data sets that the settings name and divide their examples.

    Examples of a validation or test file, of a split of that name, and lines that name their part, are in that part:
    test before validation before training, and a picture that is in one of them is taken out of the later ones,
    whichever data set these are of. All other lines go where `part_of` says; where a data set has an official part,
    what would go there trains.

    Pictures come in an order that the seed decides, whatever the order of a file's lines, and are read until the parts
    that are asked for are full; those of a file's official parts are all read. An example without an id gets one that
    follows from its content. Every data set has its share of every part, and in it they take turns.

    Raises:
        DataError: a data set is missing or malformed, two examples of a part have one id, there are too few pictures to
            give every part one, answers are withheld, or the hub cannot be reached.
        ImageError: a picture cannot be read, and the settings do not say that such lines are skipped.
        ConfigError: the `datasets` library is missing.
    """
    divider = _Divider(config, picture_config or PictureConfig(), progress)
    divider.read_official("test")
    divider.read_official("val")
    divider.divide_rest()
    return divider.result()


@dataclass
class _Source:
    """One data set while it is divided: how many examples of it each part takes, and those found so far."""

    entry: DatasetEntry
    reader: FileReader | PublishedReader
    limits: dict[str, int]
    examples: dict[str, list[Example]] = field(default_factory=lambda: {part: [] for part in PARTS})
    pictures: dict[str, set[str]] = field(default_factory=lambda: {part: set() for part in PARTS})

    @property
    def divided(self) -> set[str]:
        """The parts that are set aside from what has none."""
        return set(PARTS) - self.reader.official

    def is_full(self, parts: set[str]) -> bool:
        return all(len(self.examples[part]) >= self.limits[part] for part in parts)

    def part_of(self, picture_id: str, seed: int) -> str:
        part = part_of(picture_id, seed)
        return part if part in self.divided else "train"


class _Divider:
    def __init__(self, config: DataConfig, picture_config: PictureConfig, progress: Progress | None) -> None:
        self.config, self.progress = config, progress
        entries = parse_datasets(config.dataset)
        self.numbers = {"train": config.num_train, "val": config.num_val, "test": config.skip_test + config.num_test}
        shares = {part: dataset_shares(entries, number) for part, number in self.numbers.items()}
        self.sources = [
            _Source(entry, _open(entry, config, picture_config), {part: shares[part][i] for part in PARTS})
            for i, entry in enumerate(entries)
        ]
        self.left_out: Counter[tuple[str, str]] = Counter()
        self.ids: Counter[tuple[str, str]] = Counter()

    def read_official(self, part: str) -> None:
        """Take what is officially of a part, without pictures of those that were read before."""
        for source in self.sources:
            if part not in source.reader.official:
                continue
            for picture_id, lines in source.reader.read(part):
                self._put(source, part, picture_id, lines)
                if source.is_full({part}) and not source.reader.is_whole:
                    break

    def divide_rest(self) -> None:
        """Give all else to the parts that its pictures belong to, until all parts are full."""
        # What has fewest parts of its own first: a picture that it sets aside then trains nowhere else.
        for source in sorted(self.sources, key=lambda source: len(source.reader.official)):
            for picture_id, lines in source.reader.read("train"):
                self._put(source, source.part_of(picture_id, self.config.seed), picture_id, lines)
                if source.is_full(source.divided):
                    break

    def _put(self, source: _Source, part: str, picture_id: str, lines: Sequence[Line]) -> None:
        elsewhere = ("test", "val", "train")
        taken = next((p for p in elsewhere if any(picture_id in other.pictures[p] for other in self.sources)), part)
        if taken != part:
            self.left_out[part, taken] += len(lines)
            return
        source.pictures[part].add(picture_id)
        for example, own_id in lines:
            known = dataclasses.replace(
                example,
                known_picture_id=picture_id,
                metadata=example.metadata | self._about(source.entry),
                metric=self._metric(source.entry),
            )
            if not own_id:
                key = (known.example_id, known.content_id)
                self.ids[key] += 1
                name = f"{known.example_id}-{known.content_id[:16]}"
                known = dataclasses.replace(known, example_id=name + (f"-{self.ids[key]}" if self.ids[key] > 1 else ""))
            source.examples[part].append(known)
        if self.progress is not None and not source.reader.is_whole:
            found = sum(min(len(s.examples[p]), s.limits[p]) for s in self.sources for p in PARTS)
            self.progress(found, sum(self.numbers.values()))

    def _about(self, entry: DatasetEntry) -> dict[str, str]:
        """What tells the data sets of a mixture apart; a file by itself is as it is."""
        is_file = len(self.sources) == 1 and isinstance(self.sources[0].reader, FileReader)
        return {} if is_file else {"benchmark": entry.name}

    def _metric(self, entry: DatasetEntry) -> str | None:
        """The metric of a benchmark's examples, unless one was given for all."""
        return BENCHMARKS[entry.benchmark].metric if entry.benchmark and self.config.metric is None else None

    def result(self) -> Division:
        config, sources = self.config, self.sources
        for source in sources:
            self._check(source)
        chosen: dict[str, tuple[Example, ...]] = {}
        for part in PARTS:
            # In turns, so that the first of a part, which are profiled and timed, are a mixture too.
            turns = [
                ((i + 0.5) / source.entry.weight, number, example)
                for number, source in enumerate(sources)
                for i, example in enumerate(source.examples[part][: source.limits[part]])
            ]
            chosen[part] = tuple(example for _, _, example in sorted(turns, key=lambda turn: turn[:2]))
        chosen["test"] = chosen["test"][config.skip_test :]
        for part, examples in chosen.items():
            first: dict[str, Example] = {}
            for example in examples:
                if first.setdefault(example.example_id, example) is not example:
                    raise DataError(
                        f"{example.where}: id {example.example_id!r} was given at {first[example.example_id].where} "
                        f"already; the ids of {part} examples must be unique"
                    )
        notes = [
            f"{number} {name} example{'s' if number > 1 else ''} left out, whose pictures are also {other} pictures"
            for (name, other), number in self.left_out.items()
        ]
        names = [str(dataclasses.replace(source.entry, path=None, hub=None)) for source in sources]
        if isinstance(sources[0].reader, FileReader) and len(sources) == 1:
            names = [os.path.basename(sources[0].reader.path)]
        skipped = [text for source in sources for text in source.reader.skipped]
        return Division(",".join(names), **chosen, notes=tuple(notes), skipped=tuple(skipped))

    def _check(self, source: _Source) -> None:
        """Raise DataError unless every part has an example of a data set."""
        config, name = self.config, source.entry.path or source.entry.name
        num_test = len(source.examples["test"])
        if len(self.sources) == 1 and config.skip_test and 0 < num_test <= config.skip_test:
            raise DataError(f"skip_test is {config.skip_test}, but {name} has {num_test} test examples; skip fewer")
        empty = [part for part in PARTS if not source.examples[part]]
        if not empty:
            return
        found = ", ".join(f"{len(ids)} for {part}" for part, ids in source.pictures.items())
        text = f"{name} has too few pictures to be divided by their content ({found}; each part needs one): "
        if isinstance(source.reader, PublishedReader):
            if empty[0] in source.reader.official:
                raise DataError(
                    f"{name} has no {empty[0]} examples: the split is empty, or none of its pictures can be read, or "
                    "all are in another part"
                )
            raise DataError(f"{text}give a data set with more, or change data.seed")
        # The pictures decide, so another seed may do.
        undivided = set[str]().union(*(source.pictures[part] for part in source.divided))
        text += "change data.seed"
        for seed in range(100 if len(undivided) >= len(source.divided) else 0):
            if {source.part_of(picture_id, seed) for picture_id in undivided} == source.divided:
                text += f" (to {seed}, for example)"
                break
        raise DataError(f"{text}, name files of their own with data.val_dataset and data.test_dataset, or add pictures")


def _open(entry: DatasetEntry, config: DataConfig, picture_config: PictureConfig) -> FileReader | PublishedReader:
    path = entry.path
    if path is None or os.path.isdir(path):
        return PublishedReader(entry, config, picture_config)
    if entry.benchmark:
        raise DataError(f"there is no folder {path!r} with a copy of {entry.benchmark}; check the path")
    if os.path.basename(path) == path and not os.path.splitext(path)[1] and not os.path.exists(path):
        raise DataError(
            f"there is no data set {path!r}: it is no file, no folder and none of {', '.join(BENCHMARKS)}; others on "
            "the Hugging Face hub are named hf:owner/name"
        )
    return FileReader(path, config, picture_config)
