"""The outcome store: appended, read back unchanged, repaired after a stop, never mistaken for another model's."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pacevlm.errors import DataError, IdentityError, StorageError
from pacevlm.knobs import Knobs
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer

ANSWERS = [
    ("a" * 32, Knobs("low", 4, 12), StoredAnswer("7", 100, 2)),
    ("a" * 32, Knobs("high", 8, 16), StoredAnswer('light\n"blue" \u2028 🙂', 321, 8)),
    ("b" * 32, Knobs("low", 4, 12), StoredAnswer("", 100, 1)),
]


def held(store: OutcomeStore) -> list[tuple[str, Knobs, StoredAnswer | None]]:
    return [(content_id, knobs, store.get(content_id, knobs)) for content_id, knobs in store]


def lines_of(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def filled(path: Path | None = None) -> OutcomeStore:
    store = OutcomeStore("model-1", path)
    for answer in ANSWERS:
        store.add([answer])
    return store


def test_a_store_finds_what_it_holds_and_nothing_else() -> None:
    store = filled()
    assert len(store) == len(ANSWERS)
    assert held(store) == ANSWERS
    for content_id, knobs, answer in ANSWERS:
        assert (content_id, knobs) in store
        assert store.get(content_id, knobs) == answer
    assert ("a" * 32, Knobs("low", 4, 13)) not in store
    assert store.get("c" * 32, Knobs("low", 4, 12)) is None


def test_what_was_stored_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    content_id, knobs, answer = ANSWERS[0]
    store = filled(path)
    before = path.read_bytes()
    store.add([(content_id, knobs, StoredAnswer("other", 1, 1))])
    assert path.read_bytes() == before
    with path.open("a") as file:
        file.write(before.decode().split("\n")[1].replace('"7"', '"other"') + "\n")
    assert store.get(content_id, knobs) == OutcomeStore.open(path, "model-1").get(content_id, knobs) == answer


def test_every_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "outcomes.jsonl"
    store = OutcomeStore.open(path, "model-1")
    assert not path.exists()
    for number, answer in enumerate(ANSWERS, start=1):
        before = path.read_bytes() if path.exists() else b""
        store.add([answer])
        assert path.read_bytes().startswith(before)  # nothing is rewritten
        assert held(OutcomeStore.open(path, "model-1")) == ANSWERS[:number]
    assert all("accuracy" not in line and "example_id" not in line for line in lines_of(path))
    again = OutcomeStore.open(path, "model-1")
    again.add([("d" * 32, Knobs("low", 4, 12), StoredAnswer("more", 5, 5)), *ANSWERS])
    assert len(lines_of(path)) == 1 + len(ANSWERS) + 1
    assert len(OutcomeStore.open(path, "model-1")) == len(ANSWERS) + 1


def test_outcomes_of_another_model_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "outcomes.jsonl")
    with pytest.raises(IdentityError, match=r"model-1.*model-2"):
        OutcomeStore.open(tmp_path / "outcomes.jsonl", "model-2")


def test_a_file_torn_anywhere_loses_its_last_line_alone_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    filled(path)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        store = OutcomeStore.open(path, "model-1")
        # A last line that lacks its line end alone is whole.
        num_whole = sum(end - 1 <= size for end in ends)
        assert held(store) == ANSWERS[: max(0, num_whole - 1)]
        store.add(ANSWERS)
        assert path.read_bytes().rstrip(b"\n") == content.rstrip(b"\n")


def test_threads_of_several_engines_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    store = OutcomeStore.open(path, "model-1")
    knobs = Knobs("low", 4, 12)

    def work(worker: int) -> None:
        for number in range(40):
            # Every answer twice, from different threads.
            store.add([(f"{(worker // 2) * 40 + number:032x}", knobs, StoredAnswer("x" * number, 1 + number, 1))])

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(path)) == 1 + 160
    assert sorted(held(OutcomeStore.open(path, "model-1"))) == sorted(held(store))


@pytest.mark.parametrize(
    "change",
    [
        *[{"knobs": "low/4"}, {"knobs": 5}, {"knobs": None}, {"knobs": ["low"]}, {"content": 7}, {"content": None}],
        *[{"answer": None}, {"answer": 7}, {"num_output_tokens": "x"}, {"num_output_tokens": 0}],
        *[{"num_output_tokens": 1.5}, {"num_output_tokens": True}, {"num_prompt_tokens": None}],
        *[{"num_prompt_tokens": -3}, {"num_prompt_tokens": [1]}],
    ],
    ids=str,
)
def test_a_line_that_is_no_outcome_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "outcomes.jsonl"
    filled(path)
    lines = lines_of(path)
    whole = lines[2]
    lines[2] = json.dumps(json.loads(whole) | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"outcomes\.jsonl, record 3: "):
        OutcomeStore.open(path, "model-1")
    lines[2] = json.dumps({name: value for name, value in json.loads(whole).items() if name not in change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"outcomes\.jsonl, record 3: .* is missing"):
        OutcomeStore.open(path, "model-1")
    lines[2] = whole[:-9]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"outcomes\.jsonl is damaged: line 3"):
        OutcomeStore.open(path, "model-1")


@pytest.mark.parametrize(
    "content",
    [
        '{"content": "a"}\n',
        "garbage\n{}\n",
        '{"model_identity": "model-1"}\n',
        '{"kind": "pacevlm outcomes"}\n',
        "[]\n",
    ],
)
def test_files_that_are_no_store_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "outcomes.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"outcomes\.jsonl"):
        OutcomeStore.open(path, "model-1")
    assert path.read_text() == content


def test_an_answer_that_cannot_be_written_is_not_stored_either(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = OutcomeStore("model-1", tmp_path / "file" / "outcomes.jsonl")
    with pytest.raises(StorageError):
        store.add(ANSWERS)
    assert len(store) == 0
