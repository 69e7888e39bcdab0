import json
from dataclasses import replace
from pathlib import Path

import pytest

from pacevlm.errors import DataError
from pacevlm.evaluation.records import EvaluationRecord, read_records, write_records


def test_records_come_back_as_they_were(records: list[EvaluationRecord], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    kept = [replace(records[0], example_id="line\u2028separator\nand é", family=None), *records[1:50]]
    write_records(path, kept)
    assert read_records(path) == kept
    assert [item.name for item in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_record_that_cannot_be_written_leaves_the_old_file(records: list[EvaluationRecord], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, records[:3])
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_records(path, [*records[:5], replace(records[0], metadata={"path": tmp_path})])
    assert read_records(path) == records[:3]


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 1.5},
        {"accuracy": float("nan")},
        {"budget_ms": 0.0},
        {"latency_ms": -1.0},
        {"predicted_latency_ms": float("inf")},
        {"feasible": 1},
        {"fraction": "0.5"},
    ],
    ids=str,
)
def test_impossible_values_are_refused(records: list[EvaluationRecord], change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=next(iter(change))):
        replace(records[0], **change)


@pytest.mark.parametrize("change", [{"knobs": "high"}, {"knobs": 3}, {"speed": 1}, {"accuracy": None}], ids=str)
def test_malformed_lines_are_named(records: list[EvaluationRecord], tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(record.to_dict()) for record in records[:3]]
    lines[1] = json.dumps({**records[1].to_dict(), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_records(path)
    del lines[1]
    path.write_text(lines[0] + "\n" + json.dumps({"policy": "full"}) + "\n")
    with pytest.raises(DataError, match="line 2: a record has the keys"):
        read_records(path)
