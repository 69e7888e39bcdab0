"""Dividing files of examples by the content of their pictures, so that no picture is in two parts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from pacevlm.config import DataConfig
from pacevlm.data.jsonl import PARTS, JsonlDataset
from pacevlm.errors import DataError, ImageError
from pacevlm.images import PictureConfig
from pacevlm.types import Example, pixel_digest

TEST_SHARE, VAL_SHARE = 0.2, 0.1
# Pictures that are read at once; so many more than are needed may be read in the end.
WINDOW = 64


@dataclass(frozen=True)
class Division:
    """Examples of files in three parts; see `Splits`."""

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


def divide_files(config: DataConfig, picture_config: PictureConfig | None = None) -> Division:
    """Read the files that the settings name and divide their examples.

    Examples of a validation or test file, and lines that name their part, are in that part: test before validation
    before training, and a picture that is in one of them is taken out of the later ones. All other lines go where
    `part_of` says; where there is an official part, what would go there trains.

    Pictures come in an order that seed and names decide, whatever the order of the lines, and are read until the parts
    that are asked for are full; those of official parts are all read. An example without an id gets one that follows
    from its content.

    Raises:
        DataError: a file is missing or malformed, two files give a part the same id, or there are too few pictures to
            give every part one.
        ImageError: a picture cannot be read, and the settings do not say that such lines are skipped.
    """
    divider = _Divider(config, picture_config or PictureConfig())
    divider.read_official("test")
    divider.read_official("val")
    divider.divide_rest()
    return divider.result()


class _Line(NamedTuple):
    example: Example
    own_id: bool
    part: str | None
    file: str


class _Divider:
    def __init__(self, config: DataConfig, picture_config: PictureConfig) -> None:
        self.config, self.picture_config = config, picture_config
        self.skipped: list[str] = []
        files = {None: config.dataset, "val": config.val_dataset, "test": config.test_dataset}
        self.lines = [line for part, file in files.items() if file is not None for line in self._open(file, part)]
        self.official = {line.part for line in self.lines} & {"val", "test"}
        self.divided = set(PARTS) - self.official
        self.parts: dict[str, list[Example]] = {part: [] for part in PARTS}
        self.pictures: dict[str, set[str]] = {part: set() for part in PARTS}
        self.left_out: Counter[tuple[str, str]] = Counter()
        self.ids: Counter[str] = Counter()

    def _open(self, file: str, part: str | None) -> Iterator[_Line]:
        dataset = JsonlDataset(file, self.picture_config, skip_unreadable=self.config.skip_unreadable)
        self.skipped += dataset.skipped
        for example, own_id, named in zip(dataset, dataset.own_ids, dataset.splits, strict=True):
            if part is not None and named not in (part, None):
                raise DataError(
                    f"{example.where}: the field 'split' is {named!r}, but {file} was given as the {part} file"
                )
            yield _Line(example, own_id, part or named, dataset.path.stem)

    def read_official(self, part: str) -> None:
        """Take the lines that are officially of a part, without pictures of those that were read before."""
        for picture_id, lines in self._read([line for line in self.lines if line.part == part]):
            self._put(part, picture_id, lines)

    def divide_rest(self) -> None:
        """Give the other lines to the parts that their pictures belong to, until all parts are full."""
        for picture_id, lines in self._read([line for line in self.lines if line.part not in ("val", "test")]):
            self._put(self._part(picture_id, self.config.seed), picture_id, lines)
            if all(len(self.parts[part]) >= self._limit(part) for part in self.divided):
                return

    def _part(self, picture_id: str, seed: int) -> str:
        part = part_of(picture_id, seed)
        return part if part in self.divided else "train"

    def _limit(self, part: str) -> int:
        config = self.config
        return {"train": config.num_train, "val": config.num_val, "test": config.skip_test + config.num_test}[part]

    def _put(self, part: str, picture_id: str, lines: Sequence[_Line]) -> None:
        official = next((other for other in ("test", "val") if picture_id in self.pictures[other]), part)
        if official != part:
            self.left_out[part, official] += len(lines)
            return
        self.pictures[part].add(picture_id)
        for example, own_id, _, stem in lines:
            known = dataclasses.replace(example, known_picture_id=picture_id)
            if not own_id:
                self.ids[known.content_id] += 1
                count = self.ids[known.content_id]
                name = f"{stem}-{known.content_id[:16]}" + (f"-{count}" if count > 1 else "")
                known = dataclasses.replace(known, example_id=name)
            self.parts[part].append(known)

    def _read(self, lines: Sequence[_Line]) -> Iterator[tuple[str, list[_Line]]]:
        """Every picture's id and lines; pictures in the seed's order, lines by their text."""
        by_picture: dict[str, list[_Line]] = {}
        for line in lines:
            by_picture.setdefault(os.fspath(line.example.source), []).append(line)  # type: ignore[arg-type]
        names = sorted(by_picture, key=self._place)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(names), WINDOW):
                window = [by_picture[name] for name in names[start : start + WINDOW]]
                for own, found in zip(window, pool.map(_read_picture, [own[0].example for own in window]), strict=True):
                    if isinstance(found, str):
                        yield found, sorted(own, key=lambda line: (line.example.question, line.example.references))
                    elif self.config.skip_unreadable:
                        self.skipped += [f"{line.example.where}: {found}" for line in own]
                    else:
                        raise ImageError(f"{own[0].example.where}: {found}") from found

    def _place(self, name: str) -> str:
        # Relative to the data set, so that moving its folder changes nothing.
        relative = os.path.relpath(name, os.path.dirname(self.config.dataset))
        return hashlib.sha256(f"{self.config.seed} {relative}".encode()).hexdigest()

    def result(self) -> Division:
        config, parts = self.config, self.parts
        chosen = {part: tuple(examples[: self._limit(part)]) for part, examples in parts.items()}
        chosen["test"] = chosen["test"][config.skip_test :]
        if not all(chosen.values()):
            raise DataError(self._too_few())
        for part, examples in chosen.items():
            first: dict[str, Example] = {}
            for example in examples:
                if first.setdefault(example.example_id, example) is not example:
                    raise DataError(
                        f"{example.where}: id {example.example_id!r} was given at {first[example.example_id].where} "
                        f"already; the ids of {part} examples must be unique"
                    )
        notes = [
            f"{number} {name} example{'s' if number > 1 else ''} left out, whose pictures are also {official} pictures"
            for (name, official), number in self.left_out.items()
        ]
        return Division(os.path.basename(config.dataset), **chosen, notes=tuple(notes), skipped=tuple(self.skipped))

    def _too_few(self) -> str:
        config, pictures = self.config, self.pictures
        found = ", ".join(f"{len(ids)} for {part}" for part, ids in pictures.items())
        num_test = len(self.parts["test"])
        if config.skip_test and 0 < num_test <= config.skip_test:
            return f"skip_test is {config.skip_test}, but {config.dataset} has {num_test} test examples; skip fewer"
        text = (
            f"{config.dataset} has too few pictures to be divided by their content ({found}; each part needs one): "
            "change data.seed"
        )
        # The pictures decide, so another seed may do.
        undivided = set[str]().union(*(pictures[part] for part in self.divided))
        for seed in range(100 if len(undivided) >= len(self.divided) else 0):
            if {self._part(picture_id, seed) for picture_id in undivided} == self.divided:
                text += f" (to {seed}, for example)"
                break
        return f"{text}, name files of their own with data.val_dataset and data.test_dataset, or add pictures"


def _read_picture(example: Example) -> str | ImageError:
    """A picture's id, or why it has none."""
    try:
        return pixel_digest(dataclasses.replace(example, where="").image)
    except ImageError as error:
        return error
