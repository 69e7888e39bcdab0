"""From evaluation records to the numbers of a report: `results.json` and the terminal table."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from pacevlm.artefact import MAX_COUNT, Count, Ms, Range, Share, Text, load_artefact, save_artefact, typed
from pacevlm.errors import DataError
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.evaluation.statistics import (
    NUM_RESAMPLES,
    FloatArray,
    Interval,
    latency_percentiles,
    percentile_interval,
    ratio_interval,
    resampled_means,
    violation_proportion,
)
from pacevlm.knobs import MAX_PRICE
from pacevlm.printing import printable

RESULTS_KIND = "evaluation result"
RESULTS_SCHEMA_VERSION = 3
# Shares, and ratios of differences of shares.
_Finite = Annotated[float, Range(-1e9, 1e9)]
_Price = Annotated[float, Range(0.0, MAX_PRICE)]

POLICY_ORDER = ("controller", "predictor", "lookup_table", "fixed", "full", "cheapest", "random", "oracle")


@dataclass(frozen=True)
class RunFacts:
    """What the numbers belong to.

    Attributes:
        commit: version of the code.
        device: device that the latencies were measured on.
        model: name of the model.
        dataset_name: name of the data set.
        dataset_split: split that was evaluated.
        dtype: number type the model ran in.
        versions: versions of the libraries used.
        seeds: every seed that had an influence, by name.
        warnings: what was seen that makes the numbers of little use.
        metric: what accuracy means.
        summaries: the metric's numbers of whole sets, by policy and fraction, if it has any.
    """

    commit: str
    device: str
    model: str
    dataset_name: str
    dataset_split: str
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    metric: str = "exact_match"
    summaries: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


class IntervalEntry(TypedDict):
    """An interval as files hold it."""

    mean: _Finite
    low: _Finite
    high: _Finite


class _LatencyEntry(TypedDict):
    mean: Ms | None
    p50: Ms | None
    p95: Ms | None
    p99: Ms | None


class _ViolationEntry(TypedDict):
    rate: Share | None
    low: Share | None
    high: Share | None
    n: Count


class _PolicyEntry(TypedDict):
    accuracy: IntervalEntry
    vs_lookup_table: IntervalEntry | None
    latency_ms: _LatencyEntry
    violation_rate: Share | None
    infeasible_rate: Share
    knobs: Annotated[dict[str, Annotated[int, Range(1, MAX_COUNT)]], Range(1, MAX_COUNT)]
    violation: _ViolationEntry


class _BudgetEntry(TypedDict):
    fraction: Ms
    budget_ms: Ms
    policies: Annotated[dict[Text, _PolicyEntry], Range(1, 1000)]


class _PointEntry(TypedDict):
    accuracy: IntervalEntry
    latency_ms: IntervalEntry


class EqualAccuracyEntry(TypedDict):
    """Mean latencies at equal accuracy as files hold them."""

    points_below: Count
    mean_ms: dict[Text, Ms | None]
    ratio: dict[Text, IntervalEntry | None]


class _MeasuredEntry(TypedDict):
    free_ms: Ms
    priced_ms: Ms
    ratio: IntervalEntry
    n: Count


class _DefaultEntry(TypedDict):
    price: _Price
    change: IntervalEntry
    latency_ratio: IntervalEntry
    measured: dict[Text, _MeasuredEntry]


class _FrontsEntry(TypedDict):
    budget_ms: Ms
    own: Text
    prices: Annotated[list[_Price], Range(1, 1000)]
    policies: Annotated[dict[Text, list[_PointEntry]], Range(1, 1000)]
    equal_accuracy: list[EqualAccuracyEntry]
    default: _DefaultEntry | None


class _DatasetEntry(TypedDict):
    name: str
    split: str
    n: Count


class _MetricEntry(TypedDict):
    name: Text
    summaries: dict[Text, dict[Text, dict[Text, _Finite]]]


class _FullLatencyEntry(TypedDict):
    p50: Ms | None
    p95: Ms | None


class _FullEntry(TypedDict):
    accuracy: Share | None
    latency_ms: _FullLatencyEntry


class _Results(TypedDict):
    """What `results.json` holds."""

    commit: str
    device: str
    model: str
    dataset: _DatasetEntry
    metric: _MetricEntry
    full: _FullEntry
    budgets: Annotated[list[_BudgetEntry], Range(1, 10_000)]
    average: dict[Text, IntervalEntry | None]
    gap_closed: IntervalEntry | None
    fronts: _FrontsEntry | None
    dtype: str
    versions: dict[str, str]
    seeds: dict[str, Count]
    num_timed: Count
    warnings: list[str]


@dataclass(frozen=True)
class _Grid:
    """Records arranged by policy, fraction and example, all complete."""

    policies: tuple[str, ...]
    fractions: tuple[float, ...]
    budgets_ms: tuple[float, ...]
    example_ids: tuple[str, ...]
    cells: dict[tuple[str, float], list[EvaluationRecord]]

    def accuracy(self, policy: str) -> FloatArray:
        """`(examples, budgets)`."""
        return np.array([[record.accuracy for record in self.cells[policy, f]] for f in self.fractions]).T


def sort_policies(names: Iterable[str]) -> tuple[str, ...]:
    """Policy names in the order of every table, names of other policies behind in alphabetical order."""
    given = set(names)
    return tuple(name for name in POLICY_ORDER if name in given) + tuple(sorted(given - set(POLICY_ORDER)))


def _arrange(records: Iterable[EvaluationRecord]) -> _Grid:
    found: dict[tuple[str, float], dict[str, EvaluationRecord]] = {}
    budgets: dict[float, float] = {}
    example_ids: dict[str, None] = {}
    for record in records:
        cell = found.setdefault((record.policy, record.fraction), {})
        if record.example_id in cell:
            raise DataError(
                f"example {record.example_id!r} appears twice for {record.policy} at fraction {record.fraction}; "
                "give each request once"
            )
        cell[record.example_id] = record
        example_ids.setdefault(record.example_id)
        if budgets.setdefault(record.fraction, record.budget_ms) != record.budget_ms:
            raise DataError(
                f"fraction {record.fraction} has the budgets {budgets[record.fraction]} and {record.budget_ms} ms; "
                "one fraction must mean one budget"
            )
    if not found:
        raise DataError("there are no evaluation records to summarise")
    policies, fractions = sort_policies(policy for policy, _ in found), tuple(sorted(budgets))
    for policy in policies:
        for fraction in fractions:
            missing = example_ids.keys() - found.get((policy, fraction), {}).keys()
            if missing:
                raise DataError(
                    f"{policy} at fraction {fraction} lacks {len(missing)} of {len(example_ids)} examples, for example "
                    f"{min(missing)!r}; policies are compared on the same examples, so evaluate all of them"
                )
    ordered = tuple(sorted(example_ids))
    cells = {key: [cell[example_id] for example_id in ordered] for key, cell in found.items()}
    return _Grid(policies, fractions, tuple(budgets[f] for f in fractions), ordered, cells)


def build_results(
    records: Iterable[EvaluationRecord],
    facts: RunFacts,
    *,
    fronts: Mapping[str, Any] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that `results.json` holds, from complete records of every policy.

    Numbers that cannot be given are None: comparisons where the records hold no lookup table (or oracle), latencies
    and violation rates where no request was timed.

    Args:
        records: one per policy, fraction and example; each policy at each fraction on the same examples.
        facts: what the numbers belong to.
        fronts: as `summarise_fronts` gives them, if prices were run.
        num_resamples: bootstrap resamples of the examples, shared by all intervals.
        seed: seed of the resamples.

    Raises:
        DataError: there are no records, a request is missing or doubled, or a fraction has two budgets.
    """
    grid = _arrange(records)
    num_budgets = len(grid.fractions)
    accuracy = {policy: grid.accuracy(policy) for policy in grid.policies}
    stacked = resampled_means(np.concatenate(list(accuracy.values()), axis=1), num_resamples=num_resamples, seed=seed)
    # Resampled accuracies, (resamples, budgets) for each policy, all from the same resamples of the examples.
    resampled = {policy: stacked[:, i * num_budgets : (i + 1) * num_budgets] for i, policy in enumerate(grid.policies)}
    mean = {policy: table.mean(axis=0) for policy, table in accuracy.items()}

    def against_lookup(policy: str, budget: int | None) -> dict[str, float] | None:
        if "lookup_table" not in accuracy:
            return None
        estimate = mean[policy] - mean["lookup_table"]
        resamples = resampled[policy] - resampled["lookup_table"]
        if budget is None:
            return percentile_interval(float(estimate.mean()), resamples.mean(axis=1)).to_dict()
        return percentile_interval(float(estimate[budget]), resamples[:, budget]).to_dict()

    budgets = []
    for i, (fraction, budget_ms) in enumerate(zip(grid.fractions, grid.budgets_ms, strict=True)):
        rows = {}
        for policy in grid.policies:
            interval = percentile_interval(float(mean[policy][i]), resampled[policy][:, i])
            rows[policy] = {
                "accuracy": interval.to_dict(),
                "vs_lookup_table": against_lookup(policy, i),
                **_describe_requests(grid.cells[policy, fraction]),
            }
        budgets.append({"fraction": fraction, "budget_ms": budget_ms, "policies": rows})

    closed: Interval | None = None
    if {"controller", "lookup_table", "oracle"} <= accuracy.keys():
        low = mean["lookup_table"].mean()
        estimate = np.array([mean["controller"].mean() - low, mean["oracle"].mean() - low])
        low_resampled = resampled["lookup_table"].mean(axis=1)
        gains = [resampled[policy].mean(axis=1) - low_resampled for policy in ("controller", "oracle")]
        closed = ratio_interval(estimate, np.stack(gains, axis=1))

    full_records = [record for (policy, _), cell in grid.cells.items() if policy == "full" for record in cell]
    full_latency = latency_percentiles(_timed(full_records))
    timed = {record.example_id for cell in grid.cells.values() for record in cell if record.latency_ms is not None}
    results = {
        "commit": facts.commit,
        "device": facts.device,
        "model": facts.model,
        "dataset": {"name": facts.dataset_name, "split": facts.dataset_split, "n": len(grid.example_ids)},
        "metric": {"name": facts.metric, "summaries": dict(facts.summaries)},
        "full": {
            "accuracy": float(mean["full"].mean()) if "full" in mean else None,
            "latency_ms": {"p50": full_latency["p50"], "p95": full_latency["p95"]},
        },
        "budgets": budgets,
        "average": {policy: against_lookup(policy, None) for policy in grid.policies},
        "gap_closed": closed.to_dict() if closed else None,
        "fronts": None if fronts is None else dict(fronts),
        "dtype": facts.dtype,
        "versions": dict(facts.versions),
        "seeds": dict(facts.seeds),
        "num_timed": len(timed),
        "warnings": list(facts.warnings),
    }
    return _without_nan(results)  # type: ignore[no-any-return]


def _timed(records: Sequence[EvaluationRecord]) -> list[float]:
    return [record.latency_ms for record in records if record.latency_ms is not None]


def _describe_requests(records: Sequence[EvaluationRecord]) -> dict[str, Any]:
    """Latency, violations and knobs of one policy at one budget."""
    latency_ms: NDArray[np.float64] = np.array(
        [math.nan if record.latency_ms is None else record.latency_ms for record in records]
    )
    feasible = np.array([record.feasible for record in records])
    violation = violation_proportion(latency_ms, np.array([record.budget_ms for record in records]), feasible)
    counts = Counter(str(record.knobs) for record in records)
    return {
        "latency_ms": latency_percentiles(_timed(records)),
        "violation_rate": violation.rate,
        "infeasible_rate": float(np.mean(~feasible)),
        "knobs": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "violation": {"rate": violation.rate, "low": violation.low, "high": violation.high, "n": violation.n},
    }


def _without_nan(value: Any) -> Any:
    """The same nest with None for NaN, which JSON cannot write."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`; raises StorageError."""
    save_artefact(path, RESULTS_KIND, RESULTS_SCHEMA_VERSION, results, DataError)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read `results.json`; raises DataError if it is missing, damaged, malformed or holds no budgets."""
    values = load_artefact(path, RESULTS_KIND, RESULTS_SCHEMA_VERSION, DataError)
    results: dict[str, Any] = typed(_Results, values, os.fspath(path), DataError)
    for budget in results["budgets"]:
        if budget["policies"].keys() != results["budgets"][0]["policies"].keys():
            raise DataError(f"{path} does not hold the same policies at every budget; evaluate again")
        for name, row in budget["policies"].items():
            rates = (row["violation_rate"], *(row["violation"][key] for key in ("rate", "low", "high")))
            latencies = tuple(row["latency_ms"].values())
            if (None in rates) is not (row["violation"]["n"] == 0) or len({value is None for value in latencies}) > 1:
                raise DataError(f"{path} holds only some of the numbers of timed requests of {name}; evaluate again")
    fronts = results["fronts"]
    if fronts and any(len(points) != len(fronts["prices"]) for points in fronts["policies"].values()):
        raise DataError(f"{path} does not hold a point for every price; evaluate again")
    return results


def percent(value: float | None, *, signed: bool = False, digits: int = 1) -> str:
    """A share as a percentage, an en dash where there is none."""
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Milliseconds with one decimal below 100 ms, an en dash where there are none."""
    return "–" if value is None else f"{value:.{1 if value < 100 else 0}f}"


def interval_text(interval: Mapping[str, float] | None, *, signed: bool = False) -> str:
    """A percentage with its interval, `52.1 [50.3, 53.9]`, an en dash where there is none."""
    if interval is None:
        return "–"
    mean, low, high = (percent(interval[key], signed=signed) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def describe_fronts(fronts: Mapping[str, Any] | None) -> list[str]:
    """Mean latencies at equal accuracy, and what the default price gives, one line each."""
    if not fronts:
        return []
    own = fronts["own"].replace("_", " ")
    lines = [f"mean latency at equal accuracy (the {own}'s as a ratio):"]
    for row in fronts["equal_accuracy"]:
        others = [
            f"{name.replace('_', ' ')} {milliseconds(row['mean_ms'][name])} ms ({ratio_text(row['ratio'][name])})"
            for name in sort_policies(row["ratio"])
            if row["ratio"][name]
        ]
        first = f"{own} {milliseconds(row['mean_ms'].get(fronts['own']))} ms"
        lines.append(f"{row['points_below']} points below full: {', '.join([first, *others])}")
    if fronts["default"]:
        default = fronts["default"]
        lines.append(
            f"default price {default['price']:g}: {interval_text(default['change'], signed=True)} points, "
            f"{ratio_text(default['latency_ratio'])} of the mean latency without a price"
        )
        for name, row in default["measured"].items():
            lines.append(
                f"measured with it: {name.replace('_', ' ')} {milliseconds(row['priced_ms'])} ms on average, without a "
                f"price {milliseconds(row['free_ms'])} ms: {ratio_text(row['ratio'])}, {row['n']} questions"
            )
    return lines


def ratio_text(interval: Mapping[str, float] | None) -> str:
    """A ratio with its interval, `0.80 [0.75, 0.86]`, an en dash where there is none."""
    return "–" if interval is None else f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def format_summary(results: Mapping[str, Any]) -> str:
    """The terminal table: one row for each budget and policy, accuracies in per cent, latencies in milliseconds."""
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dataset = results["dataset"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("budget")
    table.add_column("policy")
    for name in ("accuracy %", "vs lookup table", "p50 ms", "p95 ms", "late %", "infeasible %"):
        table.add_column(name, justify="right", no_wrap=True)
    for budget in results["budgets"]:
        label = f"{budget['fraction']:g} · {milliseconds(budget['budget_ms'])} ms"
        names = sort_policies(budget["policies"])
        for i, name in enumerate(names):
            row = budget["policies"][name]
            table.add_row(
                "" if i else label,
                Text(printable(name)),
                interval_text(row["accuracy"]),
                "–" if name == "lookup_table" else interval_text(row["vs_lookup_table"], signed=True),
                milliseconds(row["latency_ms"]["p50"]),
                milliseconds(row["latency_ms"]["p95"]),
                percent(row["violation_rate"]),
                percent(row["infeasible_rate"]),
                end_section=i == len(names) - 1,
            )
    stream = StringIO()
    console = Console(file=stream, width=120, color_system=None, highlight=False)
    console.print(
        printable(
            f"{results['model']} on {dataset['name']}/{dataset['split']}, {dataset['n']} examples "
            f"({results.get('num_timed', 0)} timed), {results['metric']['name']}, {results['device']}"
        ),
        markup=False,
    )
    console.print(table)
    for name in ("controller", "predictor"):
        average = (results.get("average") or {}).get(name)
        if average:
            gain = interval_text(average, signed=True)
            console.print(f"{name} vs lookup table, mean over budgets: {gain} points", markup=False)
    if results.get("gap_closed"):
        console.print(f"gap to the oracle closed: {interval_text(results['gap_closed'])} %", markup=False)
    for line in describe_fronts(results.get("fronts")):
        console.print(printable(line), markup=False)
    for sentence in results.get("warnings") or ():
        console.print(printable(f"warning: {sentence}"), markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
