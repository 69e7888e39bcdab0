"""What was measured of a run's headroom: its file, one sentence, and the terminal tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pacevlm.artefact import Count, Ms, Range, Share, Text, load_artefact, save_artefact, typed
from pacevlm.errors import DataError
from pacevlm.evaluation.summary import (
    EqualAccuracyEntry,
    IntervalEntry,
    interval_text,
    milliseconds,
    percent,
    ratio_text,
)
from pacevlm.printing import printable

KIND, SCHEMA_VERSION = "headroom", 1
# Policies by column, and where the mean of what they gain over all budgets stands.
POLICIES = {"stage1": "learnable", "both_stages": "with latency token", "oracle": "oracle"}
MEANS = {"stage1": "learnable", "both_stages": "learnable_both_stages", "oracle": "oracle_lead"}
KNOB_HEADINGS = ["alone", "share of learnable"]
GROUP_HEADINGS = ["% of questions", "learnable"]
LATENCY_HEADINGS = ["tables ms", "predictor ms", "oracle ms", "predictor / tables", "oracle / tables"]
# Groups of the traffic that are printed; the file holds all.
NUM_SHOWN = 8
# Of more requests than this there is nothing to choose, so that little can be gained however good the choice.
MANY = 0.5
# Gains that are shown as 0.0 come from nowhere.
LEAST_NAMED = 0.0005


class _Budget(TypedDict):
    fraction: Ms
    budget_ms: Ms
    no_choice: Share
    accuracy: dict[Text, IntervalEntry]
    gain: dict[Text, IntervalEntry]


class _Knob(TypedDict):
    alone: IntervalEntry
    share: IntervalEntry


class _Group(TypedDict):
    key: Text
    value: str
    share: Share
    gain: IntervalEntry


class _Moved(TypedDict):
    num_examples: Count
    lead: IntervalEntry
    vanished: IntervalEntry | None


class _Headroom(TypedDict):
    """What `headroom.json` holds."""

    model: Text
    dataset: Text
    metric: Text
    guardrail: Text
    num_examples: Count
    num_pictures: Count
    seed: Count
    full_accuracy: IntervalEntry
    models: dict[Text, dict[Text, Share]]
    budgets: Annotated[list[_Budget], Range(1, 10_000)]
    learnable: IntervalEntry
    learnable_both_stages: IntervalEntry | None
    oracle_lead: IntervalEntry
    knobs: dict[Text, _Knob]
    groups: list[_Group]
    latency: list[EqualAccuracyEntry]
    moved: _Moved | None


def write_headroom(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write `headroom.json`; raises StorageError."""
    save_artefact(path, KIND, SCHEMA_VERSION, results, DataError)


def read_headroom(path: str | Path) -> dict[str, Any]:
    """Read `headroom.json`; raises DataError if it is missing, damaged or malformed."""
    values = load_artefact(path, KIND, SCHEMA_VERSION, DataError)
    results: dict[str, Any] = typed(_Headroom, values, os.fspath(path), DataError)
    return results


# Sentences -----------------------------------------------------------------------------------------------------------


def is_learnable(results: Mapping[str, Any]) -> bool:
    """Whether what is learnable, mean over budgets, lies above 0 with its whole interval."""
    return bool(results["learnable"]["low"] > 0)


def headroom_sentence(results: Mapping[str, Any]) -> str:
    """Whether a controller can pay, by how much, from which knob and on which traffic; one sentence.

    It can pay in accuracy where the interval of what is learnable, mean over budgets, lies above 0, and in time where
    that of the ratio of mean latencies lies below 1, at 4 points below the full configuration's accuracy if that is
    reached. The knob is that of the largest share, the group that of the highest lower end of its interval; neither is
    named where nothing is gained.
    """
    known = [entry for entry in results["latency"] if entry["ratio"]["predictor"] is not None]
    time = min(known, key=lambda entry: abs(entry["points_below"] - 4), default=None)
    ways = ["accuracy"] if is_learnable(results) else []
    ways += ["time"] if time is not None and time["ratio"]["predictor"]["high"] < 1 else []
    verdict = f"A controller can pay in {' and in '.join(ways)}" if ways else "No controller is likely to pay here"
    budgets = results["budgets"]
    text = (
        f"{verdict}: what stage 1 sees of a question gains {interval_text(results['learnable'], signed=True)} points "
        f"over the lookup table (mean over {len(budgets)} budgets; the oracle {_points(results['oracle_lead'])})"
    )
    if results["learnable"]["mean"] >= LEAST_NAMED:
        most = max(budgets, key=lambda budget: budget["gain"]["stage1"]["mean"])
        text += f", most at {most['fraction']:g} of the full latency ({_points(most['gain']['stage1'])})"
        knob = max(results["knobs"], key=lambda name: results["knobs"][name]["share"]["mean"])
        text += f", from {knob} ({_points(results['knobs'][knob]['share'])})"
        if results["groups"]:
            group = max(results["groups"], key=lambda entry: entry["gain"]["low"])
            text += (
                f" and on {group['key']} {group['value']} ({interval_text(group['gain'], signed=True)} on "
                f"{percent(group['share'], digits=0)} % of the questions)"
            )
    if time is not None:
        text += (
            f", and without budgets it takes {ratio_text(time['ratio']['predictor'])} of the tables' mean latency at "
            f"{time['points_below']} points below full accuracy"
        )
    return f"{text}."


def moved_sentence(moved: Mapping[str, Any]) -> str:
    """How much of the oracle's lead is of this very pixel grid, in a sentence."""
    lead = f"The oracle leads by {interval_text(moved['lead'], signed=True)} points on {moved['num_examples']} examples"
    if moved["vanished"] is None:
        return f"{lead}, so none of it can vanish when it chooses on pictures moved by one pixel."
    vanished = interval_text(moved["vanished"])
    return f"{lead}, of which {vanished} % vanish when it chooses on pictures moved by one pixel."


def headroom_warnings(results: Mapping[str, Any]) -> list[str]:
    """What makes the numbers of little use, one sentence each."""
    none = sum(budget["no_choice"] for budget in results["budgets"]) / len(results["budgets"])
    if none <= MANY:
        return []
    return [
        f"{percent(none, digits=0)} % of the requests have a single feasible configuration, because bounds exceed the "
        "budgets; profile on a quieter machine, give larger evaluate.budgets, or see with --margin 1.2 what such a "
        "machine would leave to choose"
    ]


def learned_share(headroom: Mapping[str, Any], results: Mapping[str, Any]) -> float | None:
    """A controller's gain over the lookup table as a share of what is learnable.

    The gain is of test questions, what is learnable of training questions, so it is a guide without an interval. None
    where nothing is shown to be learnable, there is no controller, or budgets or metric are others.

    Args:
        results: of an evaluation, as `build_results` gives them.
    """
    average = results["average"].get("controller")
    budgets = [[budget["fraction"] for budget in each["budgets"]] for each in (headroom, results)]
    if not average or not is_learnable(headroom) or budgets[0] != budgets[1]:
        return None
    if headroom["metric"] != results["metric"]["name"]:
        return None
    return float(average["mean"] / headroom["learnable"]["mean"])


# Tables --------------------------------------------------------------------------------------------------------------


def text_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables as text: first heading, other headings and rows; accuracies in per cent, gains in points."""
    views = [name for name in POLICIES if name in results["budgets"][0]["gain"]]
    budgets = [
        [
            f"{budget['fraction']:g} · {milliseconds(budget['budget_ms'])} ms",
            percent(budget["no_choice"]),
            interval_text(budget["accuracy"]["lookup_table"]),
            *[interval_text(budget["gain"][name], signed=True) for name in views],
        ]
        for budget in results["budgets"]
    ]
    budgets.append(["mean", "", "", *[interval_text(results[MEANS[name]], signed=True) for name in views]])
    knobs = [
        [name, *[interval_text(knob[what], signed=True) for what in ("alone", "share")]]
        for name, knob in results["knobs"].items()
    ]
    groups = [
        [
            f"{group['key']} {group['value']}",
            percent(group["share"], digits=0),
            interval_text(group["gain"], signed=True),
        ]
        for group in sorted(results["groups"], key=lambda entry: -entry["gain"]["low"])
    ]
    latency = [
        [
            f"{entry['points_below']} points",
            *[milliseconds(entry["mean_ms"][name]) for name in ("lookup", "predictor", "oracle")],
            *[ratio_text(entry["ratio"][name]) for name in ("predictor", "oracle")],
        ]
        for entry in results["latency"]
    ]
    return [
        ("budget", ["no choice %", "lookup table %", *[POLICIES[name] for name in views]], budgets),
        ("knob", KNOB_HEADINGS, knobs),
        ("traffic (surest first)", GROUP_HEADINGS, groups),
        ("mean latency below full", LATENCY_HEADINGS, latency),
    ]


def format_headroom(results: Mapping[str, Any]) -> str:
    """The terminal tables and sentences; accuracies in per cent, gains in points, latencies in milliseconds."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as RichText

    stream = StringIO()
    console = Console(file=stream, width=120, color_system=None, highlight=False)
    models = ", ".join(f"{POLICIES[view]} {max(tried, key=tried.__getitem__)}" for view, tried in _tried(results))
    head = (
        f"{results['model']} on {results['dataset']}/train, {results['num_examples']} examples, "
        f"{results['num_pictures']} pictures, {results['metric']}; {results['guardrail']}; predictors: {models}"
    )
    console.print(printable(head), markup=False)
    for first, headings, rows in text_tables(results):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column(first)
        for name in headings:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows[:NUM_SHOWN] if headings is GROUP_HEADINGS else rows:
            table.add_row(*[RichText(printable(text)) for text in row])
        console.print(table)
    if results["moved"]:
        console.print(moved_sentence(results["moved"]), markup=False)
    console.print(printable(headroom_sentence(results)), markup=False)
    for sentence in headroom_warnings(results):
        console.print(printable(f"warning: {sentence}"), markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _tried(results: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return list(results["models"].items())


def _points(interval: Mapping[str, float]) -> str:
    return percent(interval["mean"], signed=True)
