import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacevlm.errors import DataError
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.evaluation.statistics import gap_closed, paired_bootstrap
from pacevlm.evaluation.summary import (
    POLICY_ORDER,
    RunFacts,
    build_results,
    format_summary,
    read_results,
    write_results,
)
from pacevlm.knobs import Knobs

INTERVAL = {"mean": float, "low": float, "high": float}
POLICY = {
    "accuracy": INTERVAL,
    "vs_lookup_table": INTERVAL,
    "latency_ms": {"mean": float, "p50": float, "p95": float, "p99": float},
    "violation_rate": float,
    "infeasible_rate": float,
    "knobs": dict,
    "violation": {"rate": float, "low": float, "high": float, "n": int},
}
SCHEMA = {
    "commit": str,
    "device": str,
    "model": str,
    "dataset": {"name": str, "split": str, "n": int},
    "metric": {"name": str, "summaries": dict},
    "full": {"accuracy": float, "latency_ms": {"p50": float, "p95": float}},
    "budgets": [{"fraction": float, "budget_ms": float, "policies": {name: POLICY for name in POLICY_ORDER}}],
    "average": {name: INTERVAL for name in POLICY_ORDER},
    "gap_closed": INTERVAL,
    "fronts": {
        "budget_ms": float,
        "own": str,
        "prices": [float],
        "policies": {
            name: [{"accuracy": INTERVAL, "latency_ms": INTERVAL}] for name in ("controller", "lookup_table", "fixed")
        },
        "equal_accuracy": [
            {
                "points_below": int,
                "mean_ms": {name: float for name in ("controller", "lookup_table", "fixed")},
                "ratio": {name: INTERVAL for name in ("lookup_table", "fixed")},
            }
        ],
        "default": {
            "price": float,
            "change": INTERVAL,
            "latency_ratio": INTERVAL,
            "measured": {"controller": {"free_ms": float, "priced_ms": float, "ratio": INTERVAL, "n": int}},
        },
    },
    "dtype": str,
    "versions": dict,
    "seeds": dict,
    "num_timed": int,
    "warnings": list,
}


def check(value: Any, schema: Any, where: str = "results") -> None:
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for key, part in schema.items():
            check(value[key], part, f"{where}.{key}")
    elif isinstance(schema, list):
        assert value, where
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    else:
        assert type(value) is schema, where


def column(records: list[EvaluationRecord], policy: str) -> np.ndarray:
    """Accuracy `(examples, budgets)` of one policy, gathered without the code under test."""
    fractions = sorted({record.fraction for record in records})
    return np.array(
        [
            [r.accuracy for r in sorted(records, key=lambda r: r.example_id) if (r.policy, r.fraction) == (policy, f)]
            for f in fractions
        ]
    ).T


def test_results_have_exactly_the_schema_and_survive_json(results: dict[str, Any], tmp_path: Path) -> None:
    check(results, SCHEMA)
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results


def test_numbers_are_those_of_the_records(results: dict[str, Any], records: list[EvaluationRecord]) -> None:
    for budget in results["budgets"]:
        for name, row in budget["policies"].items():
            mine = [r for r in records if (r.policy, r.fraction) == (name, budget["fraction"])]
            timed = [r for r in mine if r.latency_ms is not None]
            counted = [r for r in timed if r.feasible]
            late = [r for r in counted if r.latency_ms is not None and r.latency_ms > r.budget_ms]
            assert row["accuracy"]["mean"] == pytest.approx(np.mean([r.accuracy for r in mine]))
            assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
            assert row["latency_ms"]["p50"] == pytest.approx(np.median([r.latency_ms for r in timed]))
            assert row["violation_rate"] == row["violation"]["rate"] == pytest.approx(len(late) / len(counted))
            assert row["violation"]["n"] == len(counted)
            assert row["infeasible_rate"] == pytest.approx(np.mean([not r.feasible for r in mine]))
            assert {Knobs.parse(text): n for text, n in row["knobs"].items()} == {
                knobs: sum(r.knobs == knobs for r in mine) for knobs in {r.knobs for r in mine}
            }
    assert results["dataset"]["n"] == 200
    assert results["num_timed"] == 60


def test_shared_resamples_give_what_the_plain_functions_give(
    results: dict[str, Any], records: list[EvaluationRecord]
) -> None:
    tables = {name: column(records, name) for name in ("controller", "lookup_table", "oracle")}
    average = paired_bootstrap(tables["controller"], tables["lookup_table"], num_resamples=1000)
    assert results["average"]["controller"] == pytest.approx(average.to_dict(), abs=1e-12)
    closed = gap_closed(*tables.values(), num_resamples=1000)
    assert closed is not None
    assert results["gap_closed"] == pytest.approx(closed.to_dict(), abs=1e-9)
    for i, budget in enumerate(results["budgets"]):
        one = paired_bootstrap(tables["oracle"][:, i], tables["lookup_table"][:, i], num_resamples=1000)
        assert budget["policies"]["oracle"]["vs_lookup_table"] == pytest.approx(one.to_dict(), abs=1e-12)


def test_oracle_bounds_every_guarded_policy(results: dict[str, Any]) -> None:
    for budget in results["budgets"]:
        ceiling = budget["policies"]["oracle"]["accuracy"]["mean"]
        for name in ("controller", "lookup_table", "fixed", "cheapest", "random"):
            assert budget["policies"][name]["accuracy"]["mean"] <= ceiling
        assert set(budget["policies"]["lookup_table"]["vs_lookup_table"].values()) == {0.0}


def test_order_of_records_does_not_matter(records: list[EvaluationRecord], facts: RunFacts) -> None:
    one = build_results(records, facts, num_resamples=100)
    assert json.dumps(build_results(records[::-1], facts, num_resamples=100)) == json.dumps(one)


def test_what_cannot_be_given_is_none(records: list[EvaluationRecord], facts: RunFacts) -> None:
    some = [replace(r, latency_ms=None, feasible=False) for r in records if r.policy in ("controller", "fixed")]
    results = build_results(some, facts, num_resamples=100)
    row = results["budgets"][0]["policies"]["fixed"]
    assert row["vs_lookup_table"] is results["gap_closed"] is results["full"]["accuracy"] is None
    assert row["violation_rate"] is row["latency_ms"]["p50"] is None
    assert (row["infeasible_rate"], row["violation"]["n"]) == (1.0, 0)
    assert "–" in format_summary(results)


def test_incomplete_or_contradicting_records_are_refused(records: list[EvaluationRecord], facts: RunFacts) -> None:
    with pytest.raises(DataError, match="no evaluation records"):
        build_results([], facts)
    with pytest.raises(DataError, match="lacks 1 of 200 examples"):
        build_results(records[1:], facts)
    with pytest.raises(DataError, match="appears twice"):
        build_results([*records, records[0]], facts)
    with pytest.raises(DataError, match="one fraction must mean one budget"):
        build_results([*records[1:], replace(records[0], budget_ms=49.0)], facts)


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"budgets": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(DataError, match=r"results\.json"):
            read_results(tmp_path / "results.json")


def test_terminal_shows_latency_at_equal_accuracy_and_the_default_price(results: dict[str, Any]) -> None:
    lines = format_summary(results).splitlines()
    row = results["fronts"]["equal_accuracy"][0]
    own, table = (f"{row['mean_ms'][name]:.1f}" for name in ("controller", "lookup_table"))
    assert (
        f"2 points below full: controller {own} ms, lookup table {table} ms (0.80 [0.80, 0.80]), "
        f"fixed {row['mean_ms']['fixed']:.1f} ms (0.67 [0.67, 0.67])" in lines
    )
    assert any(line.startswith("default price 4: -3.0 [") for line in lines)
    measured = "measured with it: controller 16.0 ms on average, without a price 20.0 ms: 0.80 [0.80, 0.80]"
    assert f"{measured}, 2 questions" in lines
    assert not any("default price" in line for line in format_summary({**results, "fronts": None}).splitlines())


def test_terminal_table_has_a_row_for_each_budget_and_policy(results: dict[str, Any]) -> None:
    lines = format_summary(results).splitlines()
    assert max(len(line) for line in lines) <= 120
    for name in POLICY_ORDER:
        rows = [line for line in lines if f" {name} " in line and ":" not in line]
        assert len(rows) == len(results["budgets"])
        for line, budget in zip(rows, results["budgets"], strict=True):
            accuracy = budget["policies"][name]["accuracy"]
            assert f"{100 * accuracy['mean']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]" in line
