"""What an evaluation leaves to look at: records, results, what is shown of them, figures and the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pacevlm.artefact import load_artefact, save_artefact, typed
from pacevlm.config import config_to_dict
from pacevlm.errors import DataError
from pacevlm.evaluation.headroom_summary import read_headroom
from pacevlm.evaluation.plots import plot_front, plot_knobs, plot_pareto
from pacevlm.evaluation.records import EvaluationRecord, read_records, write_records
from pacevlm.evaluation.report import AnsweredQuestion, write_report
from pacevlm.evaluation.summary import RunFacts, build_results, read_results, write_results
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.types import Example

RECORDS_NAME, RESULTS_NAME, SHOWN_NAME, REPORT_NAME = "records.jsonl", "results.json", "shown.json", "report.html"
HEADROOM_NAME = "headroom.json"
PARETO_STEM, KNOBS_STEM, FRONT_STEM = "pareto", "knobs", "front"
# What is drawn from the other files, and can be drawn again.
DRAWN_NAMES = (
    REPORT_NAME,
    *(f"{stem}.{kind}" for stem in (PARETO_STEM, KNOBS_STEM, FRONT_STEM) for kind in ("png", "svg")),
)
NUM_SHOWN = 8
_SHOWN_KIND, _SHOWN_SCHEMA_VERSION = "shown answers", 1


def write_outputs(
    config: RunConfig,
    records: Sequence[EvaluationRecord],
    facts: RunFacts,
    examples: Sequence[Example],
    command: str | None = None,
    fronts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write records, results, what is shown of the examples, the figures and the report; returns the results.

    Args:
        config: the run's resolved settings.
        examples: the evaluated ones, of which the report shows some.
        command: the command that ran.
        fronts: as `summarise_fronts` gives them, if prices were run.

    Raises:
        DataError: the records are incomplete.
        StorageError: a file could not be written.
    """
    run_dir = config.run_dir
    write_records(run_dir / RECORDS_NAME, records)
    results = build_results(records, facts, fronts=fronts, seed=config.evaluate.seed)
    write_results(run_dir / RESULTS_NAME, results)
    samples = [sample.to_dict() for sample in answered_questions(records, examples)]
    shown = {"command": command, "samples": samples}
    save_artefact(run_dir / SHOWN_NAME, _SHOWN_KIND, _SHOWN_SCHEMA_VERSION, shown, DataError)
    draw_outputs(config)
    return results


def draw_outputs(config: RunConfig) -> None:
    """Draw the figures and the report from what an evaluation left in the run directory, without its data set.

    Raises:
        DataError: a file of the evaluation is missing or damaged.
        StorageError: a file could not be written.
    """
    run_dir = config.run_dir
    results = read_results(run_dir / RESULTS_NAME)
    command, samples = read_shown(run_dir / SHOWN_NAME)
    plot_pareto(results, run_dir / PARETO_STEM)
    if all("controller" in budget["policies"] for budget in results["budgets"]):
        plot_knobs(results, run_dir / KNOBS_STEM)
    if results["fronts"]:
        plot_front(results, run_dir / FRONT_STEM)
    settings = config_to_dict(config)
    del settings["run_dir"]  # it may move
    measured = run_dir / HEADROOM_NAME
    headroom = read_headroom(measured) if measured.is_file() else None
    write_report(results, run_dir / REPORT_NAME, samples=samples, config=settings, command=command, headroom=headroom)


class _Shown(TypedDict):
    command: str | None
    samples: list[dict[str, Any]]


def read_shown(path: Path) -> tuple[str | None, list[AnsweredQuestion]]:
    """The command of an evaluation and the answers it shows; raises DataError if the file is missing or damaged."""
    values = load_artefact(path, _SHOWN_KIND, _SHOWN_SCHEMA_VERSION, DataError)
    shown = typed(_Shown, values, f"the {_SHOWN_KIND} at {path}", DataError)
    return shown["command"], [AnsweredQuestion.from_dict(sample) for sample in shown["samples"]]


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
