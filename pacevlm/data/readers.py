"""Data sets as pictures with their lines: JSON-lines files, and published data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from pacevlm.config import DataConfig
from pacevlm.data.benchmarks import BENCHMARKS, Origin
from pacevlm.data.jsonl import PARTS, JsonlDataset, parse_example
from pacevlm.data.published import PublishedRows, find_splits
from pacevlm.dataset_list import DatasetEntry, parse_fields
from pacevlm.errors import DataError, ImageError
from pacevlm.images import PictureConfig
from pacevlm.types import Example, pixel_digest

# Pictures that are read at once; so many more than are needed may be read in the end.
WINDOW = 64


class Line(NamedTuple):
    """An example as it was read; without an id of its own, its id is what it shall begin with."""

    example: Example
    own_id: bool


class FileReader:
    """A JSON-lines file, with the validation and test files that belong to it.

    Raises:
        DataError: a file is missing or malformed.
        ImageError: an image is missing, and such lines are not skipped.

    Attributes:
        official: parts that are in files of their own, or that lines name.
        is_whole: its official parts are read to their end, so that all their pictures are taken out of the others.
        skipped: what was wrong with each line that was left out.
    """

    is_whole = True

    def __init__(self, path: str, config: DataConfig, picture_config: PictureConfig) -> None:
        self.path, self.config, self.picture_config = path, config, picture_config
        self.skipped: list[str] = []
        self.lines: dict[str, list[Line]] = {part: [] for part in PARTS}
        for part, file in ((None, path), ("val", config.val_dataset), ("test", config.test_dataset)):
            if file is not None:
                self._open(file, part)
        self.official = {part for part in ("val", "test") if self.lines[part]}

    def _open(self, file: str, part: str | None) -> None:
        dataset = JsonlDataset(
            file,
            self.picture_config,
            skip_unreadable=self.config.skip_unreadable,
            names=parse_fields(self.config.fields),
        )
        self.skipped += dataset.skipped
        for example, own_id, named in zip(dataset, dataset.own_ids, dataset.splits, strict=True):
            if part is not None and named not in (part, None):
                raise DataError(
                    f"{example.where}: the field 'split' is {named!r}, but {file} was given as the {part} file"
                )
            named_example = example if own_id else replace(example, example_id=dataset.path.stem)
            self.lines[part or named or "train"].append(Line(named_example, own_id))

    def read(self, part: str) -> Iterator[tuple[str, list[Line]]]:
        """Ids of the pictures of an official part, or with `train` of all others, with their lines.

        Pictures come in an order that seed and names decide, lines by their text. Raises ImageError.
        """
        by_picture: dict[str, list[Line]] = {}
        for line in self.lines[part]:
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
        relative = os.path.relpath(name, os.path.dirname(self.path))
        return hashlib.sha256(f"{self.config.seed} {relative}".encode()).hexdigest()


def _read_picture(example: Example) -> str | ImageError:
    """A picture's id, or why it has none."""
    try:
        return pixel_digest(replace(example, where="").image)
    except ImageError as error:
        return error


class PublishedReader:
    """A benchmark, or another data set of the hub or a folder, read row by row.

    Raises:
        DataError: the data set is not there, or cannot be reached.
        ConfigError: the `datasets` library is missing.

    Attributes:
        official: parts that have a split of their own.
        is_whole: no more of them is read than is wanted.
        skipped: what was wrong with each row that was left out.
    """

    is_whole = False

    def __init__(self, entry: DatasetEntry, config: DataConfig, picture_config: PictureConfig) -> None:
        self.entry, self.config, self.picture_config = entry, config, picture_config
        self.skipped: list[str] = []
        # Absolute, or the library takes some names for those of the hub.
        place = entry.hub.split("/") if entry.hub else []
        repository = "/".join(place[:2]) if place else os.path.abspath(entry.path) if entry.path else ""
        if entry.benchmark:
            benchmark = BENCHMARKS[entry.benchmark]
            self.fields, self.style, self.parts = dict(benchmark.fields), benchmark.style, dict(benchmark.parts)
            if repository:
                self.parts = {part: _copy_of(origin, repository) for part, origin in self.parts.items()}
        else:
            given = dict(parse_fields(config.fields))
            self.fields, self.style = {name: name for name in ("image", "question", "answer")} | given, ""
            self.parts = self._choose(find_splits(Origin(repository, "", place[2] if len(place) > 2 else None)))
        self.official = set(self.parts) - {"train"}

    def _choose(self, splits: dict[str, Origin]) -> dict[str, Origin]:
        """The splits that are parts: a validation split tests where there is no test split with public answers."""
        if "val" in splits and ("test" not in splits or not self._rows(splits["test"]).is_public):
            splits["test"] = splits.pop("val")
        return splits if "train" in splits else {"train": splits["test"]}

    def _rows(self, origin: Origin) -> PublishedRows:
        return PublishedRows(self.entry.name, origin, self.fields, self.style, self.config.seed, self.picture_config)

    def read(self, part: str) -> Iterator[tuple[str, list[Line]]]:
        """Ids of the pictures of an official part, or with `train` of all others, a row each, in the seed's order.

        Raises ImageError and DataError.
        """
        rows = self._rows(self.parts[part])
        for number, line in enumerate(rows):
            if isinstance(line, str):
                if not self.config.skip_unreadable:
                    raise ImageError(line)
                self.skipped.append(line)
                continue
            fields = {name: value for name, value in line.items() if name != "picture_id"}
            example = parse_example(fields, rows.where(number), rows.folder, self.entry.name, self.picture_config)
            yield line["picture_id"], [Line(example, "id" in line)]


def _copy_of(origin: Origin, repository: str) -> Origin:
    """A split in a copy of its repository, or in a folder with such copies, each by its repository's name."""
    inside = os.path.join(repository, os.path.basename(origin.repository))
    return replace(origin, repository=inside if os.path.isdir(inside) else repository)
