"""What an evaluation leaves to look at: records, results, figures and the report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacevlm.evaluation.plots import plot_knobs, plot_pareto
from pacevlm.evaluation.records import EvaluationRecord, read_records, write_records
from pacevlm.evaluation.report import AnsweredQuestion, write_report
from pacevlm.evaluation.summary import RunFacts, build_results, read_results, write_results
from pacevlm.types import Example

RECORDS_NAME, RESULTS_NAME, REPORT_NAME = "records.jsonl", "results.json", "report.html"
PARETO_STEM, KNOBS_STEM = "pareto", "knobs"
OUTPUT_NAMES = (
    *(RECORDS_NAME, RESULTS_NAME, REPORT_NAME),
    *(f"{stem}.{kind}" for stem in (PARETO_STEM, KNOBS_STEM) for kind in ("png", "svg")),
)
NUM_SHOWN = 8


def write_outputs(
    run_dir: Path,
    records: Sequence[EvaluationRecord],
    facts: RunFacts,
    *,
    seed: int,
    examples: Sequence[Example] = (),
    config: dict[str, Any] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Write records, results, both figures and the report; returns the results.

    Args:
        seed: of the bootstrap.
        examples: the evaluated ones, so that the report can show some.
        config: the run's resolved settings.
        command: the command that ran.

    Raises:
        DataError: the records are incomplete.
        StorageError: a file could not be written.
    """
    write_records(run_dir / RECORDS_NAME, records)
    results = build_results(records, facts, seed=seed)
    write_results(run_dir / RESULTS_NAME, results)
    draw_outputs(run_dir, results, records, examples=examples, config=config, command=command)
    return results


def draw_outputs(
    run_dir: Path,
    results: dict[str, Any],
    records: Sequence[EvaluationRecord],
    *,
    examples: Sequence[Example] = (),
    config: dict[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Draw both figures and the report from results; raises StorageError if a file could not be written."""
    plot_pareto(results, run_dir / PARETO_STEM)
    if all("controller" in budget["policies"] for budget in results["budgets"]):
        plot_knobs(results, run_dir / KNOBS_STEM)
    samples = answered_questions(records, examples)
    write_report(results, run_dir / REPORT_NAME, samples=samples, config=config, command=command)


def read_outputs(run_dir: Path) -> tuple[dict[str, Any], list[EvaluationRecord]]:
    """Results and records of a finished evaluation; raises DataError if there are none."""
    return read_results(run_dir / RESULTS_NAME), read_records(run_dir / RECORDS_NAME)


def answered_questions(
    records: Sequence[EvaluationRecord], examples: Sequence[Example], policy: str = "controller"
) -> list[AnsweredQuestion]:
    """A few timed requests of one policy to show, different examples at budgets from the lowest to the highest."""
    by_id = {example.example_id: example for example in examples}
    own = [record for record in records if record.policy == policy and record.example_id in by_id]
    own = [record for record in own if record.latency_ms is not None] or own
    by_budget = {
        budget_ms: [record for record in own if record.budget_ms == budget_ms]
        for budget_ms in sorted({record.budget_ms for record in own})
    }
    shown: dict[str, EvaluationRecord] = {}
    # Budgets take turns, each with the first example that none has shown yet.
    for rows in itertools.islice(itertools.cycle(by_budget.values()), NUM_SHOWN if by_budget else 0):
        record = next((record for record in rows if record.example_id not in shown), None)
        if record is not None:
            shown[record.example_id] = record
    return [
        AnsweredQuestion(
            image=by_id[record.example_id].image,
            question=by_id[record.example_id].question,
            answer=str(record.metadata.get("answer", "")),
            reference=" or ".join(by_id[record.example_id].references),
            accuracy=record.accuracy,
            knobs=record.knobs,
            budget_ms=record.budget_ms,
            latency_ms=record.latency_ms,
        )
        for record in sorted(shown.values(), key=lambda record: record.budget_ms)
    ]
