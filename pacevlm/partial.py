"""What a piece of work that takes minutes has done so far, one JSON line each, so that a stop loses next to nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pacevlm.errors import DataError, PacevlmError, StorageError
from pacevlm.files import append_jsonl, read_jsonl

RecordT = TypeVar("RecordT")


class PartialFile:
    """Records of an unfinished piece of work; it goes on behind them if they belong to the same one.

    Args:
        path: the file; None keeps nothing.
        header: what the work depends on, ready for JSON. A file that begins with another one was left by other work
            and is started anew.
        what: what the file is meant to be, for the message: "interrupted evaluation".
        error: the class of error to raise.
        keep_other: refuse a file that other work left instead of starting it anew: that work took long.

    Attributes:
        records: what an interrupted start left, in order.

    Raises:
        error: the file is damaged before its last line, or is of other work that is to be kept.
        StorageError: the file cannot be started anew.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        header: Mapping[str, Any],
        what: str,
        error: type[PacevlmError] = DataError,
        *,
        keep_other: bool = False,
    ) -> None:
        self._error = error
        self.path = None if path is None else Path(path)
        # Through JSON, as the stored one went: tuples become lists.
        self._header: dict[str, Any] = json.loads(json.dumps(dict(header)))
        self.records: list[dict[str, Any]] = []
        self._is_begun = False
        if self.path is None or not self.path.exists():
            return
        try:
            found = read_jsonl(self.path, what, error)
        except error as cause:
            raise error(f"{cause}; remove the file to begin that work anew") from cause
        if found[:1] == [self._header]:
            self.records, self._is_begun = found[1:], True
        elif found and keep_other:
            other = [name for name in {**self._header, **found[0]} if found[0].get(name) != self._header.get(name)]
            raise error(
                f"{self.path} was begun for another {', '.join(other).replace('_', ' ')}; remove it, or go on with "
                "what it was begun with"
            )
        else:
            self.remove()

    def read(self, make: Callable[[dict[str, Any]], RecordT]) -> list[RecordT]:
        """What `make` makes of every record; raises the file's error for one that is malformed."""
        try:
            return [make(record) for record in self.records]
        except (AttributeError, KeyError, TypeError, ValueError, self._error) as cause:
            said = str(cause) if isinstance(cause, self._error) else repr(cause)
            raise self._error(
                f"{self.path} holds a line that is malformed ({said}); remove the file to begin that work anew"
            ) from cause

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one more record; raises StorageError if it could not be written."""
        if self.path is None:
            return
        append_jsonl(self.path, *([] if self._is_begun else [self._header]), record)
        self._is_begun = True

    def remove(self) -> None:
        """Delete the file, once what the work gives is written; raises StorageError."""
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{self.path} could not be removed: {error.strerror or error}") from error
        self._is_begun = False
