"""One line per evaluated request, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pacevlm.artefact import MAX_MS, typed
from pacevlm.errors import DataError
from pacevlm.files import read_numbered_jsonl, write_text_atomic
from pacevlm.knobs import Knobs


@dataclass(frozen=True)
class EvaluationRecord:
    """What one policy did with one example at one budget.

    Attributes:
        policy: name of the policy.
        fraction: the budget as a fraction of the full model's latency.
        budget_ms: the budget.
        example_id: the example.
        knobs: the configuration that ran.
        accuracy: score of the answer by the data set's metric, 0 to 1.
        latency_ms: wall-clock time of the request alone (batch 1), or None where it was not timed.
        predicted_latency_ms: the estimator's prediction for these knobs.
        feasible: whether the guardrail admitted any configuration at this budget.
        family: what reports break accuracy down by, if the data set has it.
        metadata: anything else worth keeping, ready for JSON.

    Raises:
        DataError: a number is not finite or outside its range.
    """

    policy: str
    fraction: float
    budget_ms: float
    example_id: str
    knobs: Knobs
    accuracy: float
    latency_ms: float | None
    predicted_latency_ms: float
    feasible: bool
    family: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = {
            "fraction": self.fraction,
            "budget_ms": self.budget_ms,
            "predicted_latency_ms": self.predicted_latency_ms,
        }
        if self.latency_ms is not None:
            positive["latency_ms"] = self.latency_ms
        for name, value in positive.items():
            if not _is_number(value) or not 0 < value <= MAX_MS:
                raise DataError(
                    f"{name} of {self.policy} on {self.example_id!r} is {value!r}; it must be positive and finite"
                )
        if not _is_number(self.accuracy) or not 0 <= self.accuracy <= 1:
            raise DataError(
                f"accuracy of {self.policy} on {self.example_id!r} is {self.accuracy!r}; it must lie in 0..1"
            )
        if not isinstance(self.feasible, bool):
            raise DataError(
                f"feasible of {self.policy} on {self.example_id!r} is {self.feasible!r}; it must be true or false"
            )

    def to_dict(self) -> dict[str, Any]:
        """The record ready for JSON, knobs as `tier/top_k/num_blocks`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "knobs": str(self.knobs)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvaluationRecord:
        """Inverse of `to_dict`; raises DataError on unknown, missing or malformed values."""
        known = {item.name for item in fields(cls)}
        required = known - {"family", "metadata"}
        if not isinstance(values, dict) or not required <= set(values) <= known:
            raise DataError(
                f"a record has the keys {sorted(known)}; missing: {sorted(required - set(values))}, "
                f"unknown: {sorted(set(values) - known)}"
            )
        record: EvaluationRecord = typed(cls, {"family": None, "metadata": {}, **values}, "a record", DataError)
        return record


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_records(path: str | Path, records: Iterable[EvaluationRecord]) -> None:
    """Write records as JSON lines, replacing the file as a whole.

    Raises:
        DataError: a record's metadata cannot be written as JSON.
        StorageError: the file cannot be written.
    """
    lines = []
    for record in records:
        try:
            lines.append(json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the record of {record.policy} on {record.example_id!r} cannot be written as JSON ({error}); "
                "keep its metadata to text, finite numbers, lists and dictionaries"
            ) from error
    write_text_atomic(path, "".join(lines))


def read_records(path: str | Path) -> list[EvaluationRecord]:
    """Read records in the order of the file; raises DataError if it is missing or says which line is malformed."""
    records = []
    for number, values in read_numbered_jsonl(path, "file of evaluation records", DataError):
        try:
            records.append(EvaluationRecord.from_dict(values))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return records
