"""One HTML file that holds a whole evaluation: figures, table, sample answers and what they belong to."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

from pacevlm.artefact import Ms, Share, typed
from pacevlm.errors import DataError
from pacevlm.evaluation.headroom_summary import (
    headroom_sentence,
    headroom_warnings,
    learned_share,
    moved_sentence,
    text_tables,
)
from pacevlm.evaluation.plots import plot_front, plot_knobs, plot_pareto
from pacevlm.evaluation.summary import describe_fronts, interval_text, milliseconds, percent, sort_policies
from pacevlm.files import write_text_atomic
from pacevlm.images import load_image
from pacevlm.knobs import Knobs
from pacevlm.printing import printable_lines

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_SIZE = (320, 300)


@dataclass(frozen=True)
class AnsweredQuestion:
    """One request to show in a report: the image, what was asked and answered, and what that took."""

    image: Image.Image
    question: str
    answer: str
    reference: str
    accuracy: float
    knobs: Knobs
    budget_ms: float
    latency_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All values ready for JSON, the image as a small PNG."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        picture = base64.b64encode(_thumbnail_png(self.image)).decode("ascii")
        return {**values, "image": picture, "knobs": str(self.knobs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnsweredQuestion:
        """Inverse of `to_dict`, but for the image's size; raises DataError if values are malformed."""
        stored = typed(_StoredQuestion, values, "an answered question", DataError)
        try:
            return cls(**{**stored, "image": load_image(base64.b64decode(stored["image"], validate=True))})
        except ValueError as error:
            raise DataError(f"the picture of an answered question is malformed: {error}") from error


class _StoredQuestion(TypedDict):
    """What `AnsweredQuestion.to_dict` gives."""

    image: str
    question: str
    answer: str
    reference: str
    accuracy: Share
    knobs: Knobs
    budget_ms: Ms
    latency_ms: Ms | None


def write_report(
    results: Mapping[str, Any],
    path: str | Path,
    *,
    samples: Sequence[AnsweredQuestion] = (),
    config: Mapping[str, Any] | None = None,
    command: str | None = None,
    headroom: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.html`, a single file that loads nothing from anywhere.

    Args:
        results: as `build_results` gives them.
        path: the file to write.
        samples: answered questions to show, with thumbnails.
        config: the run's resolved configuration, ready for JSON.
        command: the command that ran.
        headroom: as `read_headroom` gives it, if it was measured.

    Raises:
        DataError: the results hold no budgets.
        StorageError: the file cannot be written.
    """
    import jinja2

    with TemporaryDirectory() as folder:
        pareto = _data_uri(plot_pareto(results, Path(folder) / "pareto")[1].read_bytes(), "image/svg+xml")
        knobs = None
        if all("controller" in budget["policies"] for budget in results["budgets"]):
            knobs = _data_uri(plot_knobs(results, Path(folder) / "knobs")[1].read_bytes(), "image/svg+xml")
        front = None
        if results["fronts"]:
            front = _data_uri(plot_front(results, Path(folder) / "front")[1].read_bytes(), "image/svg+xml")
    source = files("pacevlm.evaluation").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: printable_lines(value) if isinstance(value, str) else value,
    )
    text = environment.from_string(source).render(
        results=results,
        tiles=_tiles(results, headroom),
        headroom=None if headroom is None else _headroom(headroom),
        groups=[_group(budget) for budget in results["budgets"]],
        numbers=_numbers(results),
        pareto=pareto,
        knobs=knobs,
        front=front,
        front_lines=describe_fronts(results["fronts"]),
        samples=[_sample(sample) for sample in samples],
        facts=_facts(results, command),
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str) if config else None,
    )
    write_text_atomic(path, text)


def _tiles(results: Mapping[str, Any], headroom: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The numbers at the top, each with a title and a note; what cannot be computed is left out."""
    tiles = []

    def add(title: str, value: str, note: str) -> None:
        tiles.append({"title": title, "value": value, "note": note})

    def range_text(interval: Mapping[str, float], *, signed: bool = False) -> str:
        return f"95 %: {percent(interval['low'], signed=signed)} to {percent(interval['high'], signed=signed)}"

    for name in ("controller", "predictor"):
        average = results["average"].get(name)
        if average:
            value = f"{percent(average['mean'], signed=True)} points"
            add(f"{name} vs lookup table, mean over budgets", value, range_text(average, signed=True))
    share = None if headroom is None else learned_share(headroom, results)
    if headroom is not None and share is not None:
        note = f"learnable: {interval_text(headroom['learnable'], signed=True)} points"
        add("controller's gain, of what is learnable", f"{percent(share, digits=0)} %", note)
    if results["gap_closed"]:
        add(
            "gap from lookup table to oracle closed",
            f"{percent(results['gap_closed']['mean'])} %",
            range_text(results["gap_closed"]),
        )
    timed = [
        budget["policies"]["controller"]["violation"]
        for budget in results["budgets"]
        if "controller" in budget["policies"]
    ]
    num_timed = sum(row["n"] for row in timed)
    if num_timed:
        late = sum(row["n"] * row["rate"] for row in timed if row["n"])
        add(
            "controller's late requests",
            f"{percent(late / num_timed)} %",
            f"{late:.0f} of {num_timed} timed and feasible",
        )
    if results["full"]["accuracy"] is not None:
        latency = results["full"]["latency_ms"]
        note = f"{milliseconds(latency['p50'])} ms p50, {milliseconds(latency['p95'])} ms p95"
        add("full model", f"{percent(results['full']['accuracy'])} %", note)
    return tiles


def _headroom(headroom: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of the headroom, all as text."""
    sentences = [headroom_sentence(headroom)]
    if headroom["moved"]:
        sentences.append(moved_sentence(headroom["moved"]))
    facts = (
        f"{headroom['num_examples']} training examples, {headroom['num_pictures']} pictures, {headroom['guardrail']}"
    )
    return {
        "sentences": sentences,
        "warnings": headroom_warnings(headroom),
        "tables": text_tables(headroom),
        "facts": facts,
    }


def _group(budget: Mapping[str, Any]) -> dict[str, Any]:
    """One budget's rows of the table, all as text."""
    rows = []
    for name in sort_policies(budget["policies"]):
        row = budget["policies"][name]
        accuracy, accuracy_range = _split(interval_text(row["accuracy"]))
        compared = None if name == "lookup_table" else row["vs_lookup_table"]
        difference, difference_range = _split(interval_text(compared, signed=True))
        violation = row["violation"]
        late_range = f"[{percent(violation['low'])}, {percent(violation['high'])}]" if violation["n"] else ""
        most_used, count = max(row["knobs"].items(), key=lambda item: item[1])
        rows.append(
            {
                "css": "controller" if name == "controller" else "",
                "label": name.replace("_", " "),
                "accuracy": accuracy,
                "accuracy_range": accuracy_range,
                "difference": difference,
                "difference_range": difference_range,
                **{f"{key}_ms": milliseconds(row["latency_ms"][key]) for key in ("mean", "p50", "p95", "p99")},
                "late": percent(row["violation_rate"]),
                "late_range": late_range,
                "infeasible": percent(row["infeasible_rate"]),
                "knobs": f"{most_used} ({percent(count / sum(row['knobs'].values()), digits=0)} %)",
            }
        )
    return {"fraction": f"{budget['fraction']:g}", "budget_ms": milliseconds(budget["budget_ms"]), "rows": rows}


def _numbers(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The metric's numbers of whole sets, mean over the budgets: their names, and a row of each policy as text."""
    summaries = results["metric"]["summaries"]
    names = list(dict.fromkeys(name for cells in summaries.values() for cell in cells.values() for name in cell))
    rows = []
    for policy in sort_policies(summaries):
        cells = summaries[policy].values()
        means = [sum(cell[name] for cell in cells) / len(cells) for name in names]
        rows.append([policy.replace("_", " "), *map(percent, means)])
    return names, rows


def _split(text: str) -> tuple[str, str]:
    """An interval's text as its mean and its range."""
    mean, _, ends = text.partition(" ")
    return mean, ends


def _facts(results: Mapping[str, Any], command: str | None) -> list[tuple[str, str]]:
    """Names and values of what the run was, those that are known."""
    dataset = results["dataset"]
    facts = [
        ("model", results["model"]),
        ("data", f"{dataset['name']}, {dataset['split']} split, n = {dataset['n']}, {results['num_timed'] or 0} timed"),
        ("metric", results["metric"]["name"]),
        ("device", results["device"]),
        ("number type", results["dtype"]),
        ("commit", results["commit"]),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in results["seeds"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ("command", command),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _sample(sample: AnsweredQuestion) -> dict[str, Any]:
    """One answered question as the template shows it."""
    facts = f"{sample.knobs}, budget {milliseconds(sample.budget_ms)} ms"
    if sample.latency_ms is not None:
        facts += f", took {milliseconds(sample.latency_ms)} ms"
    return {
        "picture": _data_uri(_thumbnail_png(sample.image), "image/png"),
        "question": sample.question,
        "answer": sample.answer,
        "reference": sample.reference,
        "accuracy": sample.accuracy,
        "facts": facts,
    }


def _thumbnail_png(image: Image.Image) -> bytes:
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail(THUMBNAIL_SIZE)
    stream = BytesIO()
    thumbnail.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
