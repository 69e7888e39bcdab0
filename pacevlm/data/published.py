"""Data sets in the format of the `datasets` library, read from the Hugging Face hub or a folder, and kept as read.

Training splits have up to a hundred gigabytes, of which a run wants a few thousand rows. So rows are streamed, in an
order that the seed decides, and what was read is kept: pictures as files, each once, and the fields of every window of
rows as one JSON file. A later start reads these alone. What is kept depends on nothing but the window's number, so a
stop loses one window, and two processes write the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pacevlm.artefact import load_artefact, save_artefact
from pacevlm.config import PictureConfig
from pacevlm.data.benchmarks import Origin
from pacevlm.errors import ConfigError, DataError, ImageError
from pacevlm.files import write_new
from pacevlm.images import load_image
from pacevlm.types import pixel_digest

KIND, SCHEMA_VERSION = "rows of a data set", 1
# Rows that are read, decoded and kept together.
WINDOW = 64
# Rows among which the next one is drawn; the row groups that they come from are drawn from all.
SHUFFLE_BUFFER = 256
_VALIDATION = ("validation", "val", "valid", "dev")


class WithheldError(DataError):
    """A split's answers are not public."""


def keeping_folder() -> Path:
    """Where rows are kept: `pacevlm` in the folder that `HF_HOME` names, as all that Hugging Face's libraries keep."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "pacevlm"


class PublishedRows:
    """The rows of one split, as lines of a JSON-lines file that also say `picture_id`.

    A question is the text of its column, with its context in front of it and its options, lettered, behind it, and the
    style before all. Of a row whose picture cannot be read there is a text instead, which says why.

    Args:
        name: what messages call the data set.
        origin: where it is.
        fields: columns by what they stand for; see `DataConfig.fields`.
        style: what stands in front of every question, with a colon; nothing if empty.
        seed: of the order.
        picture_config: how pictures are read.

    Attributes:
        folder: where its rows are kept.
    """

    def __init__(
        self,
        name: str,
        origin: Origin,
        fields: Mapping[str, str],
        style: str,
        seed: int,
        picture_config: PictureConfig,
    ) -> None:
        self.name, self.origin, self.fields, self.style = name, origin, dict(fields), style
        self.seed, self.picture_config = seed, picture_config
        facts = {
            "origin": asdict(origin),
            "files": _files_of(origin.repository),
            "fields": sorted(self.fields.items()),
            "style": style,
            "seed": seed,
            "picture": asdict(picture_config),
            "schema_version": SCHEMA_VERSION,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = keeping_folder() / f"{name}-{origin.split}-{digest}"
        self.pictures = keeping_folder() / "pictures"
        # The rows from a window on that is not kept.
        self._stream: tuple[int, Iterator[dict[str, Any]]] | None = None
        self._class_names: dict[str, Sequence[str]] = {}

    def __iter__(self) -> Iterator[dict[str, Any] | str]:
        """All rows, read as they are wanted.

        Raises:
            DataError: the data set, the split, a column or an answer is missing, or the hub cannot be reached.
            ConfigError: the `datasets` library is missing.
        """
        for number in itertools.count():
            window = self._kept(number) or self._read(number)
            yield from window["rows"]
            if window["is_last"]:
                return

    def where(self, number: int) -> str:
        """What messages call a row."""
        return f"{self.name} ({self.origin.split}), row {number + 1} as read"

    @property
    def is_public(self) -> bool:
        """Whether the first rows have answers; raises DataError."""
        try:
            next(iter(self), None)
        except WithheldError:
            return False
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _kept(self, number: int) -> dict[str, Any] | None:
        """A window that was read before, unless a picture of it is gone."""
        if not self._path(number).exists():
            return None
        window = load_artefact(self._path(number), KIND, SCHEMA_VERSION, DataError)
        lines = (row for row in window["rows"] if not isinstance(row, str))
        return window if all((self.folder / line["image"]).is_file() for line in lines) else None

    def _read(self, number: int) -> dict[str, Any]:
        """Read and keep one window."""
        if self._stream is None or self._stream[0] != number:
            self._stream = number, self._open(number * WINDOW)
        stream = self._stream[1]
        rows = list(itertools.islice(stream, WINDOW))
        self._stream = number + 1, stream
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            lines = list(pool.map(self._line, rows, range(number * WINDOW, number * WINDOW + len(rows))))
        window = {"rows": lines, "is_last": len(rows) < WINDOW}
        save_artefact(self._path(number), KIND, SCHEMA_VERSION, window, DataError)
        return window

    def _open(self, num_skipped: int) -> Iterator[dict[str, Any]]:
        datasets = _import_datasets()
        origin = self.origin
        split, configuration = _find_split(origin)
        with _clearly(origin):
            stream = datasets.load_dataset(origin.repository, configuration, split=split, streaming=True)
            # Undecoded: pictures are read in the project's own way. By row group, so that the first ones come from
            # everywhere in the split, which may begin with questions of one kind.
            if stream.features is not None:
                self._class_names = {
                    column: feature.names for column, feature in stream.features.items() if hasattr(feature, "names")
                }
                stream = stream.decode(False)
            # One group after another: threads that read several at once wait for seconds at a split's end.
            shuffled = stream.reshard().shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
        return _said_clearly(shuffled.skip(num_skipped) if num_skipped else shuffled, origin)

    # Rows ------------------------------------------------------------------------------------------------------------

    def _line(self, row: Mapping[str, Any], number: int) -> dict[str, Any] | str:
        where = self.where(number)
        for name, column in self.fields.items():
            if column not in row:
                raise DataError(
                    f"{self.name} has no column {column!r}, which holds the {name}; it has {', '.join(row)}: check "
                    "whether it is the right data set, or name its columns with data.fields"
                )
        values = {name: self._value(column, row[column]) for name, column in self.fields.items()}
        line = {name: values.pop(name, None) for name in ("image", "question", "answer", "choices", "id", "context")}
        choices = None if line["choices"] is None else [str(choice) for choice in line["choices"]]
        answers = _answers(line["answer"], choices, where)
        if not answers:
            raise WithheldError(
                f"{where} has no answer: those of the split {self.origin.split} of {self.origin.repository} are "
                "withheld, and answers are needed"
            )
        texts = [line["context"], line["question"]]
        if choices is not None:
            texts.append("\n".join(map(": ".join, zip(string.ascii_uppercase, choices, strict=False))) + "\n")
        question = "\n".join(text for text in texts if text)
        try:
            image, picture_id = self._keep_picture(line["image"])
        except ImageError as error:
            return f"{where}: {error}"
        kept = {"image": image, "picture_id": picture_id, "answer": answers}
        kept["question"] = f"{self.style}: {question}" if self.style else question
        if choices is not None:
            kept["choices"] = choices
        if line["id"] not in (None, ""):
            kept["id"] = f"{self.name}-{line['id']}"
        return kept | {name: value for name, value in values.items() if isinstance(value, (str, int, float))}

    def _value(self, column: str, value: Any) -> Any:
        """A value, and for a class its name."""
        names = self._class_names.get(column)
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value

    def _keep_picture(self, value: Any) -> tuple[str, str]:
        """Path of a picture's file relative to the rows, and digest of its pixels; raises ImageError."""
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content is None and isinstance(value, Mapping) and value.get("path"):
            import fsspec

            try:
                with fsspec.open(value["path"], "rb") as file:
                    content = file.read()
            except (OSError, ValueError) as error:
                raise ImageError(f"its picture {value['path']} cannot be read: {error}") from error
        if not isinstance(content, bytes):
            what = "no picture" if content is None else f"a {type(content).__name__} where one picture should be"
            raise ImageError(f"it has {what}")
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = self.pictures / digest[:2] / digest
        picture_id = pixel_digest(load_image(content, self.picture_config))
        if not path.exists():
            write_new(path, content, overwrite=True)
        return os.path.relpath(path, self.folder), picture_id


def _answers(value: Any, choices: Sequence[str] | None, where: str) -> list[Any]:
    """What counts as right: a text or number, a list of those, of VQA's records, or the number of an option from 0."""
    if choices is not None and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(choices):
            raise DataError(f"{where}: the answer is option {value}, but the options are 0 to {len(choices) - 1}")
        return [choices[value]]
    given = value if isinstance(value, list) else [value]
    given = [one.get("answer") if isinstance(one, Mapping) else one for one in given]
    return [one for one in given if one is not None and str(one).strip()]


# The library ---------------------------------------------------------------------------------------------------------


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "datasets is not installed, which reads data sets of the hub and of folders; pip install "
            "'pacevlm[benchmarks]'"
        ) from error
    return datasets


@contextmanager
def _clearly(origin: Origin) -> Iterator[None]:
    """Turn whatever the library raises into a DataError of one sentence."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:  # of a dozen classes of five libraries
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(origin.repository).is_dir():
            text = f"the folder {origin.repository} cannot be read as a data set: {said}"
        elif type(error).__name__ == "DatasetNotFoundError":
            text = f"there is no public data set {origin.repository} on the Hugging Face hub: {said}"
        else:
            text = (
                f"the data set {origin.repository} cannot be read from the Hugging Face hub ({said}); check the "
                "network, or give a local copy, NAME=FOLDER"
            )
        raise DataError(text) from error


def _said_clearly(rows: Iterable[dict[str, Any]], origin: Origin) -> Iterator[dict[str, Any]]:
    with _clearly(origin):
        yield from rows


def _find_split(origin: Origin) -> tuple[str, str | None]:
    """The split and the configuration of an origin as the library names them; raises DataError."""
    configuration = _find_configuration(origin)
    splits = _split_names(origin, configuration)
    same = _VALIDATION if origin.split in _VALIDATION else (origin.split,)
    split = next((name for name in (origin.split, *same) if name in splits), None)
    if split is None:
        raise DataError(f"{origin.repository} has no split {origin.split!r}; it has {', '.join(splits)}")
    return split, configuration


def _find_configuration(origin: Origin) -> str | None:
    """The configuration to read; a local copy may lack the file that names several. Raises DataError."""
    datasets = _import_datasets()
    with _clearly(origin):
        names = datasets.get_dataset_config_names(origin.repository)
    if origin.configuration in names or (origin.configuration is None and len(names) == 1):
        return origin.configuration or names[0]
    if len(names) == 1 and Path(origin.repository).is_dir():
        return str(names[0])
    raise DataError(
        f"{origin.repository} has the configurations {', '.join(names)}, not {origin.configuration!r}; name one as "
        "hf:owner/name/configuration"
    )


def _split_names(origin: Origin, configuration: str | None) -> list[str]:
    """The splits that a data set has; raises DataError."""
    datasets = _import_datasets()
    with _clearly(origin):
        return list(datasets.get_dataset_split_names(origin.repository, configuration))


def find_splits(place: Origin) -> dict[str, Origin]:
    """The splits of any data set that are named as a part, or its first one as `train`; raises DataError."""
    configuration = _find_configuration(place)
    splits = _split_names(place, configuration)
    names = {"train": ("train",), "val": _VALIDATION, "test": ("test",)}
    found = {part: next((name for name in spelt if name in splits), None) for part, spelt in names.items()}
    named = {part: split for part, split in found.items() if split is not None} or {"train": splits[0]}
    return {part: replace(place, split=split, configuration=configuration) for part, split in named.items()}


def _files_of(repository: str) -> list[tuple[str, int, int]] | None:
    """What a local folder holds, by name, size and time of change; None for what is on the hub."""
    folder = Path(repository)
    if not folder.is_dir():
        return None
    # Downloads leave hidden folders of their own in a copy.
    names = (path for path in sorted(folder.rglob("[!.]*")) if not path.relative_to(folder).parts[0].startswith("."))
    files = [(path, path.stat()) for path in names if path.is_file()]
    return [(str(path.relative_to(folder)), status.st_size, status.st_mtime_ns) for path, status in files]
