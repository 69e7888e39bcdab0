"""The outcome store: what a frozen model answered once, it would answer again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from pacevlm.errors import DataError, KnobError
from pacevlm.files import append_jsonl, read_jsonl
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs

KIND, SCHEMA_VERSION = "pacevlm outcomes", 1


class StoredAnswer(NamedTuple):
    """What a model answered: the text, and how many tokens went in and came out. Scores are not kept."""

    answer: str
    num_prompt_tokens: int
    num_output_tokens: int


Key = tuple[str, Knobs]


class OutcomeStore:
    """Answers of one model by the content of picture and question, and by knobs; any number of threads may use it.

    A file holds a header, and behind it one line for each answer. Answers are appended as they come, so that a process
    that is killed loses at most those of its last call. What was stored first stays.

    Args:
        model_identity: fingerprint of the model that gives the answers; those of another model are another thing.
        path: file that the answers are appended to; they are kept in memory alone if None.
    """

    def __init__(self, model_identity: str, path: str | Path | None = None) -> None:
        self.model_identity = model_identity
        self.path = None if path is None else Path(path)
        self._answers: dict[Key, StoredAnswer] = {}
        self._has_header = False
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._answers))

    def __contains__(self, key: Key) -> bool:
        return key in self._answers

    def get(self, content_id: str, knobs: Knobs) -> StoredAnswer | None:
        """What was answered, or None."""
        return self._answers.get((content_id, knobs))

    def add(self, answers: Iterable[tuple[str, Knobs, StoredAnswer]]) -> None:
        """Store (content id, knobs, answer); those that are stored already stay as they are.

        Raises:
            StorageError: the file could not be written; it is what it was, and so is the store.
        """
        with self._lock:
            fresh = {(content_id, knobs): answer for content_id, knobs, answer in answers}
            fresh = {key: answer for key, answer in fresh.items() if key not in self._answers}
            if self.path is not None and fresh:
                header = {"kind": KIND, "schema_version": SCHEMA_VERSION, "model_identity": self.model_identity}
                lines = [stored_line(*key, answer) for key, answer in fresh.items()]
                append_jsonl(self.path, *([] if self._has_header else [header]), *lines)
                self._has_header = True
            self._answers.update(fresh)

    @classmethod
    def open(cls, path: str | Path, model_identity: str) -> OutcomeStore:
        """The store of a file, which need not exist yet.

        Raises:
            DataError: the file holds something else, or a line is damaged; the message gives its number.
            IdentityError: the answers are another model's.
        """
        store = cls(model_identity, path)
        records = read_jsonl(path, "outcome store", DataError) if Path(path).exists() else []
        if not records:  # nothing, or a header that was torn while it was written
            return store
        head, store._has_header = records[0], True
        if head.get("kind") != KIND or head.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"{path} does not begin as an outcome store of this version of pacevlm does; remove it")
        Identity(str(head.get("model_identity"))).check(f"the outcome store {path}", Identity(model_identity))
        known: dict[Any, Knobs] = {}
        for number, record in enumerate(records[1:], start=2):
            try:
                key, answer = _parse(record, known)
            except (DataError, KnobError) as error:
                raise DataError(f"{path}, record {number}: {error}; remove the file") from error
            store._answers.setdefault(key, answer)
        return store


def stored_line(content_id: str, knobs: Knobs, answer: StoredAnswer) -> dict[str, Any]:
    """What a file of answers holds of one."""
    return {"content": content_id, "knobs": str(knobs), **answer._asdict()}


def _parse(record: Mapping[str, Any], known: dict[Any, Knobs]) -> tuple[Key, StoredAnswer]:
    """A line's content; `known` holds the knobs that were parsed before."""
    try:
        content_id, text, answer = record["content"], record["knobs"], record["answer"]
        num_prompt_tokens, num_output_tokens = record["num_prompt_tokens"], record["num_output_tokens"]
    except KeyError as error:
        raise DataError(f"{error} is missing") from error
    for name, value in (("content", content_id), ("knobs", text), ("answer", answer)):
        if not isinstance(value, str):
            raise DataError(f"{name} is {value!r}, not text")
    for name, number in (("num_prompt_tokens", num_prompt_tokens), ("num_output_tokens", num_output_tokens)):
        if type(number) is not int or number < 1:
            raise DataError(f"{name} is {number!r}, not a whole number from 1")
    if text not in known:
        known[text] = Knobs.parse(text)
    return (content_id, known[text]), StoredAnswer(answer, num_prompt_tokens, num_output_tokens)
