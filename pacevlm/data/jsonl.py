"""A user's own data set: one JSON object per line, images beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from pacevlm.config import PictureConfig
from pacevlm.errors import DataError
from pacevlm.types import Example


@dataclass(frozen=True)
class _Line:
    number: int
    example_id: str
    image_path: Path
    question: str
    answer: str
    metadata: dict[str, Any]


class JsonlDataset(Sequence[Example]):
    """Examples of a JSONL file; lines are checked on construction, images are opened on access.

    Each line is an object with `image` (a path, relative to the file's folder unless absolute), `question` and
    `answer`, all text, and optionally `id` (text or integer, unique; by default the file's name and line number).
    Any other field becomes metadata. Empty lines are ignored. Images come as RGB with their EXIF orientation applied.

    Raises:
        DataError: the file is missing, unreadable or without examples, or a line is malformed, repeats an id or names
            an image that does not exist; the message gives the line number.
    """

    def __init__(self, path: str | Path, picture_config: PictureConfig | None = None) -> None:
        self.path, self.picture_config = Path(path), picture_config or PictureConfig()
        try:
            # A byte order mark is not JSON, but some editors write one.
            text = self.path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"cannot read the data set {self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            line_number = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self.path}, line {line_number}: not UTF-8 text; save the file as UTF-8") from error
        # Not splitlines(): JSON text may hold other line separators unescaped.
        numbered = enumerate(text.split("\n"), start=1)
        self._lines = [self._parse(number, line) for number, line in numbered if line.strip()]
        if not self._lines:
            raise DataError(f"the data set {self.path} holds no examples; give one JSON object per line")
        first_lines: dict[str, int] = {}
        for line in self._lines:
            first = first_lines.setdefault(line.example_id, line.number)
            if first != line.number:
                raise DataError(
                    f"{self.path}, line {line.number}: id {line.example_id!r} was given on line {first} already; "
                    "ids must be unique"
                )

    def _parse(self, number: int, text: str) -> _Line:
        where = f"{self.path}, line {number}"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}); give one complete object per line") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: a JSON {type(fields).__name__}, not an object with image, question and answer")
        for name in ("image", "question", "answer"):
            if name not in fields:
                raise DataError(f"{where}: the field {name!r} is missing; image, question and answer are required")
            value = fields[name]
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}: the field {name!r} is {value!r}, but must be text that is not empty")
        example_id = fields.get("id", f"{self.path.stem}-{number}")
        if isinstance(example_id, bool) or not isinstance(example_id, (str, int)) or example_id == "":
            raise DataError(f"{where}: the field 'id' is {example_id!r}, but must be text or an integer")
        image_path = self.path.parent / fields["image"]
        try:
            is_file = image_path.is_file()
        except (OSError, ValueError):  # a name too long for the file system, or with a null character
            is_file = False
        if not is_file:
            raise DataError(f"{where}: there is no image {image_path}; paths are relative to the data set's folder")
        metadata = {key: value for key, value in fields.items() if key not in ("id", "image", "question", "answer")}
        return _Line(number, str(example_id), image_path, fields["question"], fields["answer"], metadata)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """The example at a place; its picture is read when it is wanted."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line = self._lines[index]
        return Example(
            line.example_id,
            line.image_path,
            line.question,
            (line.answer,),
            dict(line.metadata),
            picture_config=self.picture_config,
        )
