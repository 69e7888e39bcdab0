"""What the command line shows is what it was told."""

from __future__ import annotations

import json

import pytest

from pacevlm.console import RichReporter, print_answer
from pacevlm.knobs import Knobs
from pacevlm.types import Answer, RequestSizes, StageTimes, VisionSizes


def test_a_bound_that_is_not_promised_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    why = "nothing is promised: no gif picture was profiled, only jpeg"
    times = StageTimes(3.0, 1.0, 0.5, 3.0, 2.0, 4.0, (1.0,), 14.5)
    vision = VisionSizes(1, 20)
    answer = Answer(
        answer="7",
        token_ids=(7, 0),
        knobs=Knobs("low", 4, 12),
        sizes=RequestSizes((vision,), 12, 900),
        vision=vision,
        times=times,
        budget_ms=80.0,
        feasible=False,
        predicted_ms=14.0,
        why_infeasible=why,
    )
    print_answer(answer, as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["upper_bound_ms"] is None
    assert values["why_infeasible"] == why
    assert values["times"]["read_ms"] == 3.0
    assert (values["measured_ms"], values["budget_met"], values["num_output_tokens"]) == (14.5, False, 2)
    print_answer(answer)
    shown = capsys.readouterr().out
    assert why in shown
    assert "nothing promised" in shown
    assert "read 3.0" in shown
    assert "inf" not in shown.replace("infeasible", "")


def test_a_reporter_shows_what_it_is_told_and_no_markup_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    name, facts = "[red]5 cm[/red]", {"num_steps": 3, "reward": 0.5, "entropy": 1.0}
    with RichReporter() as reporter:
        reporter.started(name)
        reporter.missing(name, ["a.json"])
        reporter.missing(name, ["a.json", name])
        reporter.warned(name, name)
        reporter.skipped("train", facts)
        reporter.finished("train", 61.0, facts)
    shown = capsys.readouterr().err
    assert [line.strip() for line in shown.splitlines() if line.strip()] == [
        name,
        f"{name}: a.json is gone and made again",
        f"{name}: a.json, {name} are gone and made again",
        f"warning: {name}",
        "train is done already: 3 steps; reward 0.500, entropy 1.00",
        "3 steps; reward 0.500, entropy 1.00 (1 min 1 s)",
    ]
