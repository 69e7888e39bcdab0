"""A user's own data set: one JSON object per line, images beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, overload

from pacevlm.config import PictureConfig
from pacevlm.errors import DataError, ImageError
from pacevlm.files import read_bytes
from pacevlm.types import Example

PARTS = ("train", "val", "test")
_FIELDS = ("id", "image", "question", "answer", "split")


class JsonlDataset(Sequence[Example]):
    """Examples of a JSONL file; lines are checked on construction, pictures are read when they are wanted.

    Each line is an object with

    * `image`: a path, relative to the file's folder unless absolute;
    * `question`: text;
    * `answer`: a text, a number, or a list of those, all of which count as right;
    * optionally `id` (text or integer, unique; by default the file's name and line number), `choices` (the options of a
      multiple-choice question, two or more texts or numbers) and `split` (`train`, `val` or `test`, which is kept).

    Any other field becomes metadata. Empty lines are ignored.

    Args:
        path: the file.
        picture_config: how pictures are read.
        skip_unreadable: leave lines out whose picture is missing, instead of raising.
        names: what the file calls these fields where it calls them otherwise: `{"image": "img"}`.

    Raises:
        DataError: the file is missing, unreadable or without examples, or a line is malformed or repeats an id; the
            message gives the line number.
        ImageError: a line names an image that does not exist.

    Attributes:
        splits: the part that each example's line names, or None.
        own_ids: whether each example's line gives an id.
        skipped: what was wrong with each line that was left out.
    """

    def __init__(
        self,
        path: str | Path,
        picture_config: PictureConfig | None = None,
        *,
        skip_unreadable: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.picture_config = Path(path), picture_config or PictureConfig()
        self._names = {given: name for name, given in (names or {}).items()}
        self.splits: list[str | None] = []
        self.own_ids: list[bool] = []
        self.skipped: list[str] = []
        self._examples: list[Example] = []
        first_lines: dict[str, int] = {}
        for number, text in enumerate(self._read().split("\n"), start=1):  # JSON text may hold other line separators
            if not text.strip():
                continue
            try:
                example, fields = self._parse(number, text)
            except ImageError as error:
                if not skip_unreadable:
                    raise
                self.skipped.append(str(error))
                continue
            first = first_lines.setdefault(example.example_id, number)
            if first != number:
                raise DataError(
                    f"{example.where}: id {example.example_id!r} was given on line {first} already; ids must be unique"
                )
            self._examples.append(example)
            self.splits.append(fields.get("split"))
            self.own_ids.append("id" in fields)
        if not self._examples:
            unreadable = f": the pictures of all {len(self.skipped)} lines are missing" if self.skipped else ""
            raise DataError(f"the data set {self.path} holds no examples{unreadable}; give one JSON object per line")

    def _read(self) -> str:
        content = read_bytes(self.path, "data set", DataError)
        try:
            # A byte order mark is not JSON, but some editors write one.
            return content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line_number = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self.path}, line {line_number}: not UTF-8 text; save the file as UTF-8") from error

    def _parse(self, number: int, text: str) -> tuple[Example, dict[str, Any]]:
        where = f"{self.path}, line {number}"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}); give one complete object per line") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: a JSON {type(fields).__name__}, not an object with image, question and answer")
        for column, name in self._names.items():
            if name in ("image", "question", "answer") and column not in fields:
                raise DataError(f"{where}: there is no field {column!r}, which was given as the {name}")
        # What the file itself calls `image` is not the picture, if another field was named.
        fields = {
            self._names.get(name, name): value
            for name, value in fields.items()
            if name in self._names or name not in self._names.values()
        }
        example = parse_example(fields, where, self.path.parent, f"{self.path.stem}-{number}", self.picture_config)
        return example, fields

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]


def parse_example(
    fields: Mapping[str, Any], where: str, folder: Path, default_id: str, picture_config: PictureConfig
) -> Example:
    """The example that the fields of a line say; see `JsonlDataset`.

    Args:
        where: file and line, for messages.
        folder: what relative paths start from.
        default_id: the id of an example whose fields give none.

    Raises:
        DataError: a field is missing or malformed.
        ImageError: there is no such image.
    """
    for name in ("image", "question", "answer"):
        if name not in fields:
            raise DataError(f"{where}: the field {name!r} is missing; image, question and answer are required")
    for name in ("image", "question"):
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise DataError(f"{where}: the field {name!r} is {fields[name]!r}, but must be text that is not empty")
    answers = fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"]]
    references = _texts(answers, f"{where}: the field 'answer'")
    example_id = fields.get("id", default_id)
    if isinstance(example_id, bool) or not isinstance(example_id, (str, int)) or example_id == "":
        raise DataError(f"{where}: the field 'id' is {example_id!r}, but must be text or an integer")
    if fields.get("split", "train") not in PARTS:
        raise DataError(f"{where}: the field 'split' is {fields['split']!r}, but must be one of {', '.join(PARTS)}")
    metadata = {key: value for key, value in fields.items() if key not in _FIELDS}
    if "choices" in fields:
        choices = fields["choices"] if isinstance(fields["choices"], list) else []
        metadata["choices"] = _texts(choices, f"{where}: the field 'choices'")
    image_path = folder / fields["image"]
    try:
        is_file = image_path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a null character
        is_file = False
    if not is_file:
        raise ImageError(f"{where}: there is no image {image_path}; paths are relative to the data set's folder")
    return Example(str(example_id), image_path, fields["question"], references, metadata, picture_config, where)


def _texts(values: list[Any], what: str) -> tuple[str, ...]:
    """Texts and numbers as texts; raises DataError for anything else, for blank ones and for none at all."""
    texts = tuple(_number_text(value) if _is_number(value) else value for value in values)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{what} is {values!r}, but must be a text, a number, or a list of at least one of them")
    return texts


def _is_number(value: Any) -> bool:
    # A whole number may be too large to be asked whether it is finite.
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _number_text(value: float) -> str:
    """A number as a person writes it: 7.0 as `7`, 1e3 as `1000`, 0.50 as `0.5`."""
    if isinstance(value, int):
        return str(value)
    digits = format(Decimal(repr(value + 0.0)), "f")  # + 0.0 takes the sign off -0.0
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
