#!/usr/bin/env python3
"""Several finished evaluations, one training seed each, taken together: gain over the baselines, and late requests.

All must have asked the same questions at the same budgets. Seeds are averaged question by question, and the interval
resamples questions; late requests are those of all runs. Prints a table and, last, one JSON line, which also goes to
RESULTS/evaluations-MODEL.json. Nothing is run: everything is read from the records.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pacevlm.evaluation.records import EvaluationRecord, read_records
from pacevlm.evaluation.statistics import (
    bootstrap_mean,
    paired_bootstrap,
    proportion_interval,
    ratio_interval,
    resampled_means,
)
from pacevlm.evaluation.summary import interval_text, percent, read_results
from pacevlm.files import write_json_atomic

Cells = dict[tuple[str, float], dict[str, EvaluationRecord]]


def read_cells(folder: Path) -> Cells:
    """Records of one evaluation by policy and budget, then by question."""
    cells: Cells = {}
    for record in read_records(folder / "records.jsonl"):
        cells.setdefault((record.policy, record.fraction), {})[record.example_id] = record
    return cells


def accuracy(runs: list[Cells], policy: str, fraction: float, ids: list[str]) -> np.ndarray:
    """Mean over the runs, `(questions,)`."""
    return np.mean([[run[policy, fraction][i].accuracy for i in ids] for run in runs], axis=0)


def late(runs: list[Cells], policy: str, fraction: float) -> dict[str, Any]:
    """Share of timed requests with something feasible that missed their budget, with its Wilson interval."""
    timed = [r for run in runs for r in run[policy, fraction].values() if r.latency_ms is not None and r.feasible]
    misses = sum(r.latency_ms > r.budget_ms for r in timed if r.latency_ms is not None)
    if not timed:
        return {"rate": None, "low": None, "high": None, "n": 0}
    found = proportion_interval(misses, len(timed), method="wilson")
    return {"rate": misses / len(timed), "low": found.low, "high": found.high, "n": len(timed)}


def main() -> None:
    """Read, pool, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    runs = [read_cells(folder) for folder in arguments.run_dirs]
    facts = [read_results(folder / "results.json") for folder in arguments.run_dirs]
    asked = {(key, tuple(sorted(cell))) for run in runs for key, cell in run.items()}
    if len(asked) != len(runs[0]):
        raise SystemExit("the evaluations asked different questions or budgets; give runs of the same ones")
    ids = sorted(next(iter(runs[0].values())))
    budgets: list[dict[str, Any]] = []
    gains, over_fixed, lead = [], [], []
    for budget in facts[0]["budgets"]:
        fraction = budget["fraction"]
        mean = {p: accuracy(runs, p, fraction, ids) for p in ("controller", "lookup_table", "fixed", "oracle")}
        gains.append(mean["controller"] - mean["lookup_table"])
        over_fixed.append(mean["controller"] - mean["fixed"])
        lead.append(mean["oracle"] - mean["lookup_table"])
        records = [r for run in runs for r in run["controller", fraction].values()]
        budgets.append(
            {
                "fraction": fraction,
                "budget_ms": budget["budget_ms"],
                "infeasible_rate": float(np.mean([not r.feasible for r in records])),
                **{policy: bootstrap_mean(values).to_dict() for policy, values in mean.items()},
                "gain": paired_bootstrap(mean["controller"], mean["lookup_table"]).to_dict(),
                "gain_over_fixed": paired_bootstrap(mean["controller"], mean["fixed"]).to_dict(),
                "late": {policy: late(runs, policy, fraction) for policy in ("controller", "lookup_table")},
            }
        )
    average = np.stack([np.mean(gains, axis=0), np.mean(lead, axis=0)], axis=1)
    closed = ratio_interval(average.mean(axis=0), resampled_means(average))
    results = {
        "commits": sorted({f["commit"] for f in facts}),
        "device": facts[0]["device"],
        "model": facts[0]["model"],
        "dataset": facts[0]["dataset"],
        "train_seeds": [f["seeds"]["train"] for f in facts],
        "num_timed": [f["num_timed"] for f in facts],
        "budgets": budgets,
        "gain": bootstrap_mean(average[:, 0]).to_dict(),
        "gain_over_fixed": bootstrap_mean(np.mean(over_fixed, axis=0)).to_dict(),
        "gain_per_seed": [f["average"]["controller"] for f in facts],
        "gap_closed": closed.to_dict(),
    }
    table = Table(title=f"{len(runs)} evaluations of {len(ids)} questions")
    for column in (
        "budget",
        "infeasible %",
        "lookup table %",
        "controller less it, points",
        "less fixed",
        "late %",
        "its late %",
    ):
        table.add_column(column)
    for row in budgets:
        shown = [
            f"{percent(x['rate'])} [{percent(x['low'])}, {percent(x['high'])}], n {x['n']}"
            for x in row["late"].values()
        ]
        gain, over = (interval_text(row[key], signed=True) for key in ("gain", "gain_over_fixed"))
        infeasible, base = percent(row["infeasible_rate"]), percent(row["lookup_table"]["mean"])
        table.add_row(f"{row['fraction']:g}", infeasible, base, gain, over, *shown)
    mean_gains = (interval_text(results[key], signed=True) for key in ("gain", "gain_over_fixed"))
    table.add_row("mean", "", "", *mean_gains, "", "")
    Console(width=160).print(table)
    print(f"gap to the oracle closed: {interval_text(results['gap_closed'])} %")
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"evaluations-{Path(results['model']).name}.json"
    write_json_atomic(target, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
