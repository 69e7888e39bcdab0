#!/usr/bin/env python3
"""What finished controllers gain over the lookup table on many questions: answers only, nothing is timed.

Every run directory is one training; all of them must share profile and training questions. Knobs are chosen under the
bounds that they were trained with (those of the profile), so that the figure does not hang on how busy the machine was
when bounds were calibrated last; `--margin` sets them to a multiple of the predictions, as `pacevlm headroom --margin`
does. Paired by question; the interval resamples questions. Prints a table and, last, one JSON line, which also goes to
RESULTS/controller-MODEL.json. Outcomes are kept in the first run's directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.controller.policy import ControllerPolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.evaluation.statistics import bootstrap_mean
from pacevlm.evaluation.sweep import build_requests, choose_knobs, fit_baselines
from pacevlm.files import write_json_atomic
from pacevlm.pipeline.artefacts import PROFILE_GUARDRAIL_NAME
from pacevlm.pipeline.context import RunContext
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.training.run_record import source_commit
from pacevlm.types import Example, Objective


def open_run(folder: Path, skip_test: int, num_test: int) -> RunContext:
    """A run with other test questions than it was made with."""
    config = load_run_config(folder)
    data = dataclasses.replace(config.data, skip_test=skip_test, num_test=num_test)
    return RunContext(dataclasses.replace(config, data=data))


def answer_accuracy(
    policy: Policy, run: RunContext, examples: list[Example], requests: list[list[PolicyInput]], progress: Progress
) -> np.ndarray:
    """Accuracy of the knobs that a policy chooses, `(budgets, examples)`."""
    task = progress.add_task(policy.name, total=len(requests))
    rows = []
    for row in requests:
        knobs = choose_knobs(policy, run.engine, examples, row)
        outcomes = run.engine.run(list(zip(examples, knobs, strict=True)))
        rows.append([outcome.accuracy for outcome in outcomes])
        progress.advance(task)
    return np.array(rows)


def summarise(values: np.ndarray) -> dict[str, float]:
    """Mean over questions `(n,)` with its 95 % bootstrap interval."""
    return bootstrap_mean(values).to_dict()


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="finished runs, one training seed each")
    parser.add_argument("--skip", type=int, default=3000, help="test questions left out in front")
    parser.add_argument("--num", type=int, default=5000, help="test questions to judge on")
    parser.add_argument("--margin", type=float, help="bounds are this many times the predictions, 1.2 for example")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    first = open_run(arguments.run_dirs[0], arguments.skip, arguments.num)
    examples = list(first.splits.test)
    fractions = first.config.evaluate.budgets
    objectives = [Objective(fraction * first.full_p50_ms, first.config.train.budget_kind) for fraction in fractions]
    pacing = first.pacing(PROFILE_GUARDRAIL_NAME)
    if arguments.margin is not None:
        pacing = dataclasses.replace(pacing, guardrail=pacing.guardrail.with_margin(arguments.margin))
    with Progress(console=console) as progress:
        trained_on = first.splits.train[: first.config.lookup.num_examples]
        fitted = fit_baselines(first.engine, trained_on, objectives, pacing, full_ms=first.full_p50_ms, seed=0)
        table = next(policy for policy in fitted if isinstance(policy, LookupTable))
        requests = build_requests(first.engine, examples, objectives, pacing)
        base = answer_accuracy(table, first, examples, requests, progress)
        gains = []
        for folder in arguments.run_dirs:
            controller = open_run(folder, arguments.skip, arguments.num).controller().eval()
            if controller.estimator_fingerprint != first.estimator.fingerprint:
                raise SystemExit(f"{folder} has another latency estimator than {arguments.run_dirs[0]}")
            gains.append(answer_accuracy(ControllerPolicy(controller), first, examples, requests, progress) - base)
    stacked = np.array(gains)
    results: dict[str, Any] = {
        "commit": source_commit() or "unknown",
        "model": first.config.model.path,
        "dataset": {"name": first.splits.name, "split": "test", "skipped": arguments.skip, "n": len(examples)},
        "guardrail": "profile" if arguments.margin is None else f"{arguments.margin:g} times the predictions",
        "seeds": [load_run_config(folder).train.seed for folder in arguments.run_dirs],
        "budgets": [
            {
                "fraction": fraction,
                "infeasible_rate": float(np.mean([not request.any_feasible for request in requests[i]])),
                "lookup_table": summarise(base[i]),
                "gain_per_seed": [summarise(gain[i]) for gain in stacked],
                "gain": summarise(stacked[:, i].mean(axis=0)),
            }
            for i, fraction in enumerate(fractions)
        ],
        "gain_per_seed": [summarise(gain.mean(axis=0)) for gain in stacked],
        "gain": summarise(stacked.mean(axis=(0, 1))),
    }
    shown = Table(title=f"controller less lookup table, {len(examples)} questions, {len(stacked)} seed(s), points")
    for column in ("budget", "infeasible %", "lookup table %", "gain"):
        shown.add_column(column)
    rows = [
        (f"{row['fraction']:g}", row["infeasible_rate"], row["lookup_table"]["mean"], row["gain"])
        for row in results["budgets"]
    ]
    for label, infeasible, accuracy, gain in rows:
        shown.add_row(label, f"{infeasible:.1%}", f"{accuracy:.1%}", _points(gain))
    shown.add_row("mean", "", "", _points(results["gain"]))
    for seed, gain in zip(results["seeds"], results["gain_per_seed"], strict=True):
        shown.add_row(f"mean, seed {seed}", "", "", _points(gain))
    Console().print(shown)
    target = arguments.results / f"controller-{Path(first.config.model.path).name}.json"
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, results)
    console.print(f"written to {target}")
    print(json.dumps(results))


def _points(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:+.2f} [{100 * value['low']:+.2f}, {100 * value['high']:+.2f}]"


if __name__ == "__main__":
    main()
