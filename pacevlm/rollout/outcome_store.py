"""The outcome store: what a frozen model answered once, it would answer again."""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from pacevlm.errors import DataError, KnobError, StorageError
from pacevlm.files import check_regular, write_atomic
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs

# A file with any other table, or with a view, a trigger or an index, is no store. Answers about a content lie together.
_TABLES = [
    ("model", "CREATE TABLE model (identity TEXT NOT NULL)"),
    (
        "outcomes",
        "CREATE TABLE outcomes (content TEXT NOT NULL CHECK (typeof(content) = 'text'), "
        "knobs TEXT NOT NULL CHECK (typeof(knobs) = 'text'), answer TEXT NOT NULL CHECK (typeof(answer) = 'text'), "
        "num_prompt_tokens INTEGER NOT NULL CHECK (typeof(num_prompt_tokens) = 'integer' AND num_prompt_tokens >= 1), "
        "num_output_tokens INTEGER NOT NULL CHECK (typeof(num_output_tokens) = 'integer' AND num_output_tokens >= 1), "
        "PRIMARY KEY (content, knobs)) WITHOUT ROWID",
    ),
]
_OF_CONTENT = "SELECT knobs, answer, num_prompt_tokens, num_output_tokens FROM outcomes WHERE content = ?"
BYTES_PER_OUTCOME = 80
"""What an outcome takes of the file, roughly (`benchmarks/outcome_store.py`)."""
# Outcomes that are kept as they were read, some 150 MB: a sweep of 6,900 contents over 75 configurations.
MAX_KEPT = 2**19
BUSY_SECONDS = 60.0
# What the disk, the folder or another process is to blame for; anything else is in the file.
_OF_STORAGE = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS),
}
_parse_knobs = lru_cache(maxsize=4096)(Knobs.parse)


class StoredAnswer(NamedTuple):
    """What a model answered: the text, and how many tokens went in and came out. Scores are not kept."""

    answer: str
    num_prompt_tokens: int
    num_output_tokens: int


Key = tuple[str, Knobs]


class OutcomeStore:
    """Answers of one model by the content of picture and question, and by knobs; any number of threads may use it.

    An SQLite database, in a file or in memory. What was stored first stays. Processes of one machine may share a file,
    under one name or symbolic links to it: the journal that repairs it lies beside it and is found by its name. A
    process that is killed loses at most the answers of its last call, and so does a machine without power. The answers
    about a content are read at once; what another process adds to them later may be missed, and is then answered again.

    Args:
        model_identity: fingerprint of the model that gives the answers; those of another model are another thing.
        path: file of the answers, made if it is missing; they are kept in memory alone if None.

    Raises:
        DataError: the file holds something else or is damaged.
        IdentityError: the answers are another model's.
        StorageError: the file cannot be opened or made, also in any later call.
    """

    def __init__(self, model_identity: str, path: str | Path | None = None) -> None:
        self.model_identity = model_identity
        self.path = None if path is None else Path(path)
        self._kept: dict[str, dict[Knobs, tuple[Any, ...]]] = {}
        self._num_kept = 0
        self._lock = Lock()
        with _naming(self.path):
            self._database = _connect(self.path)
            weakref.finalize(self, self._database.close)
            self._check()

    def __len__(self) -> int:
        (row,) = self._rows("SELECT count(*) FROM outcomes")
        return int(row[0])

    def __iter__(self) -> Iterator[Key]:
        keys = self._rows("SELECT content, knobs FROM outcomes")
        return iter([(content, _parse_knobs(knobs)) for content, knobs in keys])

    def __contains__(self, key: Key) -> bool:
        return key[1] in self._rows_of(key[0])

    def get(self, content_id: str, knobs: Knobs) -> StoredAnswer | None:
        """What was answered, or None."""
        row = self._rows_of(content_id).get(knobs)
        return None if row is None else StoredAnswer._make(row[1:])

    def add(self, answers: Iterable[tuple[str, Knobs, StoredAnswer]]) -> None:
        """Store (content id, knobs, answer), all or none; those that are stored already stay as they are.

        Raises:
            StorageError: the file could not be written; it is what it was, and so is the store.
        """
        rows = [(content_id, str(knobs), *answer) for content_id, knobs, answer in answers]
        with self._lock, _naming(self.path):
            with self._database:
                self._database.executemany("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", rows)
            # Another process may have stored other answers first, so they are read again.
            for content_id in {row[0] for row in rows}:
                self._forget(content_id)

    def _rows_of(self, content_id: str) -> dict[Knobs, tuple[Any, ...]]:
        """All that is stored about a content, in plain tuples: those burden no garbage collection."""
        kept = self._kept.get(content_id)
        if kept is not None:
            return kept
        with self._lock, _naming(self.path):
            rows = self._database.execute(_OF_CONTENT, (content_id,)).fetchall()
            self._forget(content_id)
            self._kept[content_id] = found = {_parse_knobs(row[0]): row for row in rows}
            self._num_kept += 1 + len(found)
            while self._num_kept > MAX_KEPT and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))
            return found

    def _forget(self, content_id: str) -> None:
        if content_id in self._kept:
            self._num_kept -= 1 + len(self._kept.pop(content_id))

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with self._lock, _naming(self.path):
            return self._database.execute(query).fetchall()

    def _check(self) -> None:
        """Make the tables of an empty file, or read all of one that is not: nothing long runs on a damaged one."""
        database = self._database
        if not _tables(database):
            with database:
                database.execute("BEGIN IMMEDIATE")
                if not _tables(database):  # no other process was faster
                    for _, table in _TABLES:
                        database.execute(table)
                    database.execute("INSERT INTO model VALUES (?)", (self.model_identity,))
        if _tables(database) != [("table", name, name, table) for name, table in _TABLES]:
            raise DataError(f"{self.path} is no outcome store of this version of pacevlm; remove it")
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        identities = database.execute("SELECT identity FROM model").fetchall()
        if found != "ok" or len(identities) != 1:
            raise DataError(f"{self.path} is damaged ({found}, {len(identities)} models); remove it")
        Identity(str(identities[0][0])).check(f"the outcome store {self.path}", Identity(self.model_identity))
        # Every text is read, for what is no UTF-8; and what is out of order would not be found.
        last = ("", "")
        for content, knobs, _ in database.execute("SELECT content, knobs, answer FROM outcomes"):
            _parse_knobs(knobs)
            if (content, knobs) <= last:
                raise DataError(f"{self.path} is damaged ({content[:40]!r} is out of order); remove it")
            last = content, knobs


def copy_store(source: Path, target: Path) -> None:
    """Copy a store as it is between two calls of its writers, whole or not at all; raises DataError, StorageError."""
    with write_atomic(target) as temporary, _naming(source):
        temporary.touch()  # of a store that holds nothing yet, nothing is written
        with closing(_connect(source)) as database, closing(sqlite3.connect(temporary)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")
            database.backup(copy)


def _connect(path: Path | None) -> sqlite3.Connection:
    """A connection whose transactions block other writers from their beginning, and that trusts nothing in the file."""
    if path is None:
        name = ":memory:"
    else:
        if os.path.islink(path) and not path.exists():
            raise DataError(
                f"{path} is a link to {os.path.realpath(path)}, which is not there; put it back, or remove the link"
            )
        if path.exists():
            check_regular(path, "outcome store", DataError)
        name = os.fspath(path.absolute())
        os.makedirs(os.path.dirname(name), exist_ok=True)
    database = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE", check_same_thread=False)
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _tables(database: sqlite3.Connection) -> list[tuple[str, ...]]:
    """All that a database's schema holds."""
    return database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY rowid").fetchall()


@contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Make errors of the database this package's, with the file's name."""
    try:
        yield
    except (KnobError, UnicodeDecodeError) as error:
        raise DataError(f"the outcome store {path} is damaged ({error}); remove it") from error
    except (sqlite3.Error, OSError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if isinstance(error, sqlite3.Error) and code not in _OF_STORAGE:
            raise DataError(f"the outcome store {path} is damaged or another file ({error}); remove it") from error
        raise StorageError(
            f"the outcome store {path} could not be read or written: {error}. What it held stays; free some space, "
            "end what else uses it, or choose another folder, then run again"
        ) from error
