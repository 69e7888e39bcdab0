"""The outcome store: what was stored first stays, whoever writes or is stopped; no damaged or foreign file is read."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pacevlm.errors import DataError, IdentityError, PacevlmError, StorageError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.rollout import outcome_store
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer, copy_store
from tests.stored_answers import change, read_answers

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = [
    ("a" * 32, Knobs("high", 8, 16), StoredAnswer('light\n"blue" \u2028 🙂 \x00 end', 321, 8)),
    ("a" * 32, Knobs("low", 4, 12), StoredAnswer("7", 100, 2)),
    ("b" * 32, Knobs("low", 4, 12), StoredAnswer("", 100, 1)),
]


def held(store: OutcomeStore) -> list[tuple[str, Knobs, StoredAnswer | None]]:
    return [(content_id, knobs, store.get(content_id, knobs)) for content_id, knobs in store]


def filled(path: Path | None = None) -> OutcomeStore:
    store = OutcomeStore("model-1", path)
    for answer in ANSWERS:
        store.add([answer])
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outcomes.sqlite"


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_store_finds_what_it_holds_and_nothing_else(in_memory: bool, path: Path) -> None:
    store = filled(None if in_memory else path)
    for one in (store, *(() if in_memory else (OutcomeStore("model-1", path),))):
        assert len(one) == len(ANSWERS)
        assert held(one) == ANSWERS
        assert all((content_id, knobs) in one for content_id, knobs, _ in ANSWERS)
        assert ("a" * 32, Knobs("low", 4, 13)) not in one
        assert one.get("c" * 32, Knobs("low", 4, 12)) is None
    assert path.exists() != in_memory


def test_what_was_stored_first_stays(path: Path) -> None:
    content_id, knobs, answer = ANSWERS[0]
    store = filled(path)
    before = path.read_bytes()
    store.add([(content_id, knobs, StoredAnswer("other", 1, 1))])
    store.add([])
    assert path.read_bytes() == before
    assert store.get(content_id, knobs) == OutcomeStore("model-1", path).get(content_id, knobs) == answer
    store.add([("c" * 32, knobs, answer), ("c" * 32, knobs, StoredAnswer("other", 1, 1))])
    assert store.get("c" * 32, knobs) == answer


def test_every_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "outcomes.sqlite"
    store = OutcomeStore("model-1", path)
    for number, answer in enumerate(ANSWERS, start=1):
        store.add([answer])
        assert held(OutcomeStore("model-1", path)) == ANSWERS[:number]
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # no journal stays
    assert [row[:3] for row in read_answers(path)] == [(c, str(knobs), a.answer) for c, knobs, a in ANSWERS]


def test_reading_writes_nothing_and_needs_no_right_to(path: Path) -> None:
    filled(path)
    before = path.read_bytes()
    path.chmod(0o444)
    assert held(OutcomeStore("model-1", path)) == ANSWERS
    assert path.read_bytes() == before


def test_what_another_store_answered_first_is_what_both_give(path: Path) -> None:
    one, other = filled(path), OutcomeStore("model-1", path)
    key = ("d" * 32, Knobs("low", 4, 12))
    assert key not in one
    other.add([(*key, StoredAnswer("first", 5, 5))])
    one.add([(*key, StoredAnswer("second", 6, 6))])
    assert one.get(*key) == other.get(*key) == StoredAnswer("first", 5, 5)


def test_few_contents_are_kept_in_memory_and_all_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_store, "MAX_KEPT", 10)
    store, knobs = OutcomeStore("model-1", path), list(KnobSpace())[:4]
    keys = [(f"{number:032x}", choice) for number in range(20) for choice in knobs]
    assert not any(key in store for key in keys)
    store.add([(*key, StoredAnswer(str(key), 1, 1)) for key in keys])
    for _ in range(2):
        for key in (*keys, *keys[::-7]):
            assert store.get(*key) == StoredAnswer(str(key), 1, 1)
            assert len(store._kept) <= 2
            assert store._num_kept == sum(1 + len(answers) for answers in store._kept.values())


def test_outcomes_of_another_model_are_refused(path: Path) -> None:
    filled(path)
    with pytest.raises(IdentityError, match=r"outcome store .*model-1.*model-2"):
        OutcomeStore("model-2", path)


def test_threads_add_each_answer_once(path: Path) -> None:
    store, knobs = OutcomeStore("model-1", path), Knobs("low", 4, 12)
    seen: list[bool] = []

    def work(worker: int) -> None:
        for number in range(40):
            # Every answer twice, from different threads.
            content_id = f"{(worker // 2) * 40 + number:032x}"
            store.add([(content_id, knobs, StoredAnswer("x" * number, 1 + number, 1))])
            seen.append((content_id, knobs) in store)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 320
    assert len(store) == 160
    assert held(OutcomeStore("model-1", path)) == held(store)


def write_much(path: Path, worker: int, num: int) -> None:
    store = OutcomeStore("model-1", path)
    for number in range(num):
        knobs = Knobs("low", 1 + number, 12)
        # Every second answer is one that the others have as well.
        mine = f"{number % 2 * (1 + worker):032x}"
        store.add([(mine, knobs, StoredAnswer(f"worker {worker}", 1, 1)), ("e" * 32, knobs, StoredAnswer("", 1, 1))])
        assert store.get("e" * 32, knobs) == StoredAnswer("", 1, 1)


def test_processes_that_write_at_once_lose_nothing_and_store_nothing_twice(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_much, args=(path, worker, 60)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = OutcomeStore("model-1", path)
    assert len(store) == 60 + 30 + 3 * 30
    assert len(set(store)) == len(store)


KILLED = """
import sys
from pathlib import Path
from pacevlm.knobs import Knobs
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer
store = OutcomeStore("model-1", sys.argv[1])
for number in range(int(sys.argv[2]), 10**6):
    content, answer = f"{number * 7919 % 10**6:032x}", StoredAnswer("x" * 200, 1, 1)
    store.add([(content, Knobs("low", 4, blocks), answer) for blocks in range(1, 41)])
    print(number, flush=True)
"""


def test_a_killed_writer_loses_at_most_its_last_call(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = 0
    for kills in range(6):
        command = [sys.executable, "-c", KILLED, str(path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(5 + 7 * kills):
                done = int(process.stdout.readline()) + 1
            process.send_signal(signal.SIGKILL)
            done = max([done, *(int(line) + 1 for line in process.stdout if line.endswith("\n"))])
        # A copy of the folder as it was left is as good.
        copy = path.with_name(f"copy-{kills}")
        copy.mkdir()
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, copy)
        for left in (copy / path.name, path):
            store = OutcomeStore("model-1", left)
            assert len(store) in (40 * done, 40 * (done + 1))
        done = len(store) // 40


def test_a_writer_that_stopped_within_a_transaction_is_undone(path: Path) -> None:
    """The journal of a hard stop, made on purpose: the pages are in the file already, and go again."""
    filled(path)
    writer = sqlite3.connect(path, isolation_level=None)
    with closing(writer):
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN IMMEDIATE")
        rows = [(f"{number:032x}", "low/4/12", "x" * 500, 1, 1) for number in range(200)]
        writer.executemany("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?)", rows)
        stopped = path.with_name("stopped")
        stopped.mkdir()
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, stopped)
    journal = stopped / f"{path.name}-journal"
    assert journal.exists()
    assert (stopped / path.name).stat().st_size > path.stat().st_size
    for kept in (path, stopped / path.name):
        assert held(OutcomeStore("model-1", kept)) == ANSWERS
    assert not journal.exists()


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Files that cannot grow beyond a size stand for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_on_the_disk_is_not_stored_and_nothing_else_is_lost(path: Path) -> None:
    store = filled(path)
    many = [(f"{number:032x}", Knobs("low", 4, 12), StoredAnswer("x" * 300, 1, 1)) for number in range(400)]
    for spare in (0, 100, 5000, 50_000):
        with full_disk(path.stat().st_size + spare), pytest.raises(StorageError, match=r"outcomes\.sqlite could not"):
            store.add(many)
        assert held(store) == held(OutcomeStore("model-1", path)) == ANSWERS
    store.add(many)
    assert len(OutcomeStore("model-1", path)) == len(ANSWERS) + len(many)
    with full_disk(100), pytest.raises(StorageError):
        OutcomeStore("model-1", path.with_name("new.sqlite"))
    assert len(OutcomeStore("model-1", path.with_name("new.sqlite"))) == 0


def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"outcomes\.sqlite could not be"):
        OutcomeStore("model-1", tmp_path / "file" / "outcomes.sqlite")


def test_a_file_that_somebody_holds_is_waited_for_and_then_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_store, "BUSY_SECONDS", 0.05)
    store = filled(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="locked"):
            store.add([("c" * 32, Knobs("low", 4, 12), StoredAnswer("", 1, 1))])
        with pytest.raises(StorageError, match="locked"):
            OutcomeStore("model-1", path)
    assert held(store) == ANSWERS


def test_one_store_serves_several_folders_by_links(tmp_path: Path) -> None:
    """Also before it exists, and after all folders moved together; a link that lost its store is said."""
    place = tmp_path / "study" / "run" / "outcomes.sqlite"
    place.parent.mkdir(parents=True)
    (tmp_path / "study" / "outcomes.sqlite").touch()
    place.symlink_to("../outcomes.sqlite")
    assert held(filled(place)) == ANSWERS
    moved = (tmp_path / "study").rename(tmp_path / "moved")
    assert held(OutcomeStore("model-1", moved / "outcomes.sqlite")) == ANSWERS
    assert held(OutcomeStore("model-1", moved / "run" / "outcomes.sqlite")) == ANSWERS
    (moved / "run").rename(tmp_path / "alone")
    with pytest.raises(DataError, match=r"alone/outcomes\.sqlite is a link to .*which is not there; put it back"):
        OutcomeStore("model-1", tmp_path / "alone" / "outcomes.sqlite")
    assert not (tmp_path / "outcomes.sqlite").exists()


def test_a_copy_is_whole_while_others_write(path: Path) -> None:
    filled(path)
    target = path.with_name("copy.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM outcomes")
        copy_store(path, target)
    assert held(OutcomeStore("model-1", target)) == held(OutcomeStore("model-1", path)) == ANSWERS
    path.write_bytes(b"")  # no store yet
    copy_store(path, target)
    assert len(OutcomeStore("model-1", target)) == 0
    path.write_bytes(b"no database " * 100)
    with pytest.raises(DataError, match=r"outcomes\.sqlite is damaged or another file"):
        copy_store(path, path.with_name("second.sqlite"))
    assert sorted(file.name for file in path.parent.iterdir()) == ["copy.sqlite", path.name]


@pytest.mark.parametrize(
    "statement",
    [
        *(f"UPDATE outcomes SET {name} = x'00' WHERE answer = '7'" for name in ("content", "knobs", "answer")),
        "UPDATE outcomes SET knobs = 'low/4' WHERE answer = '7'",
        "UPDATE outcomes SET answer = CAST(x'ff' AS TEXT) WHERE answer = '7'",
        "UPDATE outcomes SET content = CAST(x'c3' AS TEXT) WHERE answer = '7'",
        *(f"UPDATE outcomes SET num_output_tokens = {value} WHERE answer = '7'" for value in ("0", "-3", "1.5", "'x'")),
        *("UPDATE outcomes SET num_prompt_tokens = x'01' WHERE answer = '7'", "DELETE FROM model"),
        *("INSERT INTO model VALUES ('model-1')", "UPDATE model SET identity = x'00'"),
        *("CREATE TABLE more (a)", "CREATE INDEX more ON outcomes (answer)", "CREATE VIEW more AS SELECT * FROM model"),
        "CREATE TRIGGER more AFTER INSERT ON outcomes BEGIN DELETE FROM outcomes; END",
        *("DROP TABLE outcomes", "ALTER TABLE outcomes RENAME COLUMN answer TO response", "ALTER TABLE model ADD a"),
        *("CREATE VIRTUAL TABLE more USING fts5(a)", "ANALYZE"),
    ],
)
def test_a_file_that_says_what_no_store_does_is_refused(path: Path, statement: str) -> None:
    filled(path)
    change(path, statement)
    before = path.read_bytes()
    with pytest.raises(PacevlmError, match=r"outcomes\.sqlite") as raised:
        OutcomeStore("model-1", path)
    assert isinstance(raised.value, (DataError, IdentityError))
    assert path.read_bytes() == before


def test_a_view_in_a_tables_place_is_not_read(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE model (identity TEXT NOT NULL)")
        database.execute("INSERT INTO model VALUES ('model-1')")
        database.execute("CREATE VIEW outcomes AS SELECT load_extension('evil') AS content, 1 AS knobs")
        database.commit()
    with pytest.raises(DataError, match="is no outcome store of this version of pacevlm; remove it"):
        OutcomeStore("model-1", path)


@pytest.mark.parametrize(
    "content", [b"garbage\n{}\n", b"[]\n", b"xy", b"\x00" * 5000, b"SQLite format 3\x00", b"{}" * 9000]
)
def test_files_that_are_no_database_are_refused_and_stay(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"outcomes\.sqlite .*; remove it"):
        OutcomeStore("model-1", path)
    assert path.read_bytes() == content


def test_a_file_that_is_cut_anywhere_is_refused(path: Path) -> None:
    store = filled(path)
    store.add([(f"{number:032x}", Knobs("low", 4, 12), StoredAnswer("x" * 100, 1, 1)) for number in range(300)])
    content = path.read_bytes()
    for size in range(2, len(content), 509):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"outcomes\.sqlite"):
            OutcomeStore("model-1", path)


def test_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(DataError, match="no regular file"):
            OutcomeStore("model-1", tmp_path / name)
