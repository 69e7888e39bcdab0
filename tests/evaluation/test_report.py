import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pacevlm.evaluation.report import AnsweredQuestion, write_report
from pacevlm.evaluation.summary import POLICY_ORDER, describe_fronts
from pacevlm.knobs import Knobs

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Gathers tags, references and text, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def report(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    samples = [
        AnsweredQuestion(
            Image.new("RGB", (900, 400), "navy"), "How many <b>?", "17", "17", 1.0, Knobs("low", 4, 12), 65, 60.5
        ),
        AnsweredQuestion(Image.new("L", (20, 30)), "Which?", "red", "blue", 0.0, Knobs("high", 8, 16), 120.0),
    ]
    write_report(
        results, path, samples=samples, config={"seed": 11, "link": "<x>"}, command="pacevlm evaluate --seed 11"
    )
    return path


def test_report_loads_nothing_from_outside(report: Path) -> None:
    source, reader = report.read_text(encoding="utf-8"), read(report)
    assert len(reader.references) == 5
    assert all(reference.startswith("data:image/") for reference in reader.references)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"https?://|url\(|@import", source)
    pareto = base64.b64decode(reader.references[0].partition("base64,")[2]).decode()
    assert "</svg>" in pareto
    # Namespaces are names, not resources; nothing in the figure may point elsewhere.
    assert not re.search(r"(href|src)=\"https?:", pareto)


def test_report_shows_every_policy_budget_and_fact(report: Path, results: dict[str, Any]) -> None:
    text = " ".join(read(report).text)
    for name in POLICY_ORDER:
        assert text.count(name.replace("_", " ")) >= len(results["budgets"])
    for budget in results["budgets"]:
        assert f"{budget['fraction']:g} of the full model" in text
        assert f"{100 * budget['policies']['controller']['accuracy']['mean']:.1f}" in text
    for fact in (
        "a test device",
        "0123abc",
        "pacevlm evaluate --seed 11",
        "n = 200",
        "float32",
        "bootstrap 0",
        "numpy",
    ):
        assert fact in text
    assert '"seed": 11' in text
    for line in describe_fronts(results["fronts"]):
        assert line in text


def test_text_from_outside_is_escaped(report: Path) -> None:
    reader = read(report)
    assert "How many <b>?" in " ".join(reader.text)
    assert reader.tags.count("b") == sum(
        "tile" in line for line in report.read_text().splitlines() if '<div class="tile">' in line
    )
    assert "x" not in reader.tags


def test_thumbnails_are_small(report: Path) -> None:
    from io import BytesIO

    content = [reference for reference in read(report).references if "image/png" in reference]
    sizes = [Image.open(BytesIO(base64.b64decode(item.partition("base64,")[2]))).size for item in content]
    assert sizes == [(320, 142), (20, 30)]


def test_partial_results_still_make_a_report(results: dict[str, Any], tmp_path: Path) -> None:
    budgets = []
    for budget in results["budgets"]:
        row = budget["policies"]["fixed"]
        bare = {
            **row,
            "vs_lookup_table": None,
            "violation_rate": None,
            "violation": {"rate": None, "low": None, "high": None, "n": 0},
            "latency_ms": dict.fromkeys(row["latency_ms"]),
        }
        budgets.append({**budget, "policies": {"fixed": bare}})
    partial = {
        **results,
        "budgets": budgets,
        "gap_closed": None,
        "fronts": None,
        "average": {"fixed": None},
        "full": {"accuracy": None, "latency_ms": {"p50": None, "p95": None}},
        "num_timed": 0,
    }
    write_report(partial, tmp_path / "report.html")
    reader = read(tmp_path / "report.html")
    assert len(reader.references) == 1
    assert "None" not in " ".join(reader.text)
