"""The parts of a data set are apart, repeatable, and as large as asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pacevlm.config import DataConfig
from pacevlm.data.splits import load_splits
from pacevlm.errors import DataError


def write_dataset(path: Path, count: int) -> Path:
    Image.new("RGB", (8, 8)).save(path.parent / "image.png")
    lines = [
        json.dumps({"id": f"q{i}", "image": "image.png", "question": f"{i}?", "answer": "1"}) for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


def test_digits_come_in_their_own_parts() -> None:
    splits = load_splits(DataConfig(num_train=5, num_val=3, num_test=4, seed=2))
    assert splits.name == "digits"
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5, 3, 4]
    ids = [example.example_id for part in (splits.train, splits.val, splits.test) for example in part]
    assert ids[0] == "digits-train-2-0"
    assert len(set(ids)) == 12
    assert splits.train[1] is splits.train[1]  # made once
    assert [example.example_id for example in splits.test[1:3]] == ["digits-test-2-1", "digits-test-2-2"]
    with pytest.raises(IndexError):
        splits.val[3]


def test_a_file_is_divided_without_overlap(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.jsonl", 50)
    config = DataConfig(dataset=str(path), num_train=20, num_val=100, num_test=100)
    splits = load_splits(config)
    parts = [{example.example_id for example in part} for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in parts] == [20, 5, 10]
    assert len(set().union(*parts)) == 35
    again = load_splits(config)
    assert [example.example_id for example in again.test] == [example.example_id for example in splits.test]
    other = load_splits(DataConfig(dataset=str(path), num_train=20, num_val=100, num_test=100, seed=1))
    assert {example.example_id for example in other.test} != parts[2]


def test_a_test_file_leaves_the_rest_to_training(tmp_path: Path) -> None:
    train = write_dataset(tmp_path / "data.jsonl", 40)
    test = write_dataset(tmp_path / "test.jsonl", 6)
    splits = load_splits(DataConfig(dataset=str(train), test_dataset=str(test), num_test=4))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [36, 4, 4]
    # The two files use the same ids, yet no outcome can be taken for another's.
    assert [example.example_id for example in splits.test] == [f"test:q{i}" for i in range(4)]
    assert splits.name == "data.jsonl"


def test_a_file_too_small_to_divide_is_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.jsonl", 9)
    with pytest.raises(DataError, match="holds 9 examples, too few"):
        load_splits(DataConfig(dataset=str(path)))


def test_skipped_test_examples_are_in_no_part(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.jsonl", 50)
    test = write_dataset(tmp_path / "test.jsonl", 9)
    for settings in ({}, {"dataset": str(path)}, {"dataset": str(path), "test_dataset": str(test)}):
        whole = load_splits(DataConfig(num_train=20, num_val=5, num_test=8, **settings))
        rest = load_splits(DataConfig(num_train=20, num_val=5, num_test=5, skip_test=3, **settings))
        ids = [example.example_id for example in rest.test]
        assert ids == [example.example_id for example in whole.test][3:]
        skipped = {example.example_id for example in whole.test[:3]}
        assert not skipped & {example.example_id for part in (rest.train, rest.val, rest.test) for example in part}
