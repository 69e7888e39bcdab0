"""Remembered outcomes: saved and loaded unchanged, and never mistaken for another model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pacevlm.errors import DataError, IdentityError, StorageError
from pacevlm.knobs import Knobs
from pacevlm.rollout.memory import OutcomeMemory
from pacevlm.types import Outcome

OUTCOMES = [
    Outcome("a", Knobs("low", 4, 12), "7", 1.0, 100, 2),
    Outcome("a", Knobs("high", 8, 16), 'light\n"blue" � 🙂', 0.25, 321, 8),
    Outcome("b/ü", Knobs("low", 4, 12), "", 0.0, 100, 1),
]


def filled(identity: str = "model-1") -> OutcomeMemory:
    memory = OutcomeMemory(identity)
    for outcome in OUTCOMES:
        memory.add(outcome)
    return memory


def test_memory_finds_what_it_holds_and_nothing_else() -> None:
    memory = filled()
    assert len(memory) == len(OUTCOMES)
    assert list(memory) == OUTCOMES
    for outcome in OUTCOMES:
        assert (outcome.example_id, outcome.knobs) in memory
        assert memory.get(outcome.example_id, outcome.knobs) == outcome
    assert ("a", Knobs("low", 4, 13)) not in memory
    assert memory.get("b", Knobs("low", 4, 12)) is None


def test_save_and_load_change_nothing(tmp_path: Path) -> None:
    for memory in (filled(), OutcomeMemory("model-1")):
        memory.save(tmp_path / "outcomes.jsonl")
        loaded = OutcomeMemory.load(tmp_path / "outcomes.jsonl", "model-1")
        assert list(loaded) == list(memory)
        assert loaded.model_identity == "model-1"


def test_outcomes_of_another_model_are_refused(tmp_path: Path) -> None:
    filled().save(tmp_path / "outcomes.jsonl")
    with pytest.raises(IdentityError, match=r"model-1.*model-2"):
        OutcomeMemory.load(tmp_path / "outcomes.jsonl", "model-2")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    filled().save(path)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for end in (last, last + 1, last + 20, len(content) - 2):
        path.write_bytes(content[:end])
        assert list(OutcomeMemory.load(path, "model-1")) == OUTCOMES[:-1]


@pytest.mark.parametrize(
    "change",
    [
        {"knobs": "low/4"},
        {"knobs": 5},
        {"knobs": None},
        {"accuracy": "good"},
        {"accuracy": None},
        {"num_output_tokens": "x"},
        {"num_prompt_tokens": None},
    ],
    ids=str,
)
def test_a_line_that_is_no_outcome_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "outcomes.jsonl"
    filled().save(path)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"outcomes\.jsonl"):
        OutcomeMemory.load(path, "model-1")
    del (record := json.loads(lines[1]))[next(iter(change))]
    path.write_text("\n".join([lines[0], json.dumps(record)]) + "\n")
    with pytest.raises(DataError, match=r"outcomes\.jsonl"):
        OutcomeMemory.load(path, "model-1")


@pytest.mark.parametrize("content", ["", "\n", "{", '{"example_id": "a"}\n', "garbage\n{}\n"])
def test_files_that_hold_no_memory_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "outcomes.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"outcomes\.jsonl"):
        OutcomeMemory.load(path, "model-1")


def test_missing_files_and_folders_that_are_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        OutcomeMemory.load(tmp_path / "nowhere.jsonl", "model-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        filled().save(tmp_path / "file" / "outcomes.jsonl")
