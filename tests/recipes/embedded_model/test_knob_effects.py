from __future__ import annotations

import pytest

from pacevlm.data.digit_tasks import load_digits
from pacevlm.data.digits import DigitVQA
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.engine import RolloutEngine
from recipes.embedded_model.knob_effects import format_costs, measure_knob_effects, one_knob_at_a_time


def test_each_row_changes_one_knob_and_full_costs_nothing(tiny_elastic: ElasticModel) -> None:
    engine = RolloutEngine(tiny_elastic)
    full = tiny_elastic.knob_space.full
    settings = one_knob_at_a_time(engine)
    for knob in ("tier", "top_k", "num_blocks"):
        assert settings[knob][0] == full
        others = {"tier", "top_k", "num_blocks"} - {knob}
        assert all(getattr(value, other) == getattr(full, other) for value in settings[knob] for other in others)
    examples = list(DigitVQA("test", 4))
    result = measure_knob_effects(engine, examples)
    assert result["n"] == 4
    for rows in result["by_knob"].values():
        assert rows[0]["vs_full"].mean == 0.0
        assert all(0 <= row["accuracy"].low <= row["accuracy"].mean <= row["accuracy"].high <= 1 for row in rows)
    outcomes = engine.run([(example, full) for example in examples])
    assert result["full"]["accuracy"].mean == sum(outcome.accuracy for outcome in outcomes) / 4


def test_costs_are_broken_down_by_task_where_examples_have_one(tiny_elastic: ElasticModel) -> None:
    engine = RolloutEngine(tiny_elastic)
    assert "by_task" not in measure_knob_effects(engine, list(DigitVQA("test", 2)))
    examples = list(load_digits("test", 8, "detail=1,overview=1"))
    result = measure_knob_effects(engine, examples)
    assert set(result["by_task"]) == {example.metadata["task"] for example in examples}
    assert sum(facts["n"] for facts in result["by_task"].values()) == 8
    lowest = engine.model.knob_space.cheapest
    for knob, rows in result["by_knob"].items():
        for row in rows[1:]:
            parts = [facts["cost"][knob][row["knobs"]].mean * facts["n"] for facts in result["by_task"].values()]
            assert sum(parts) / 8 == pytest.approx(row["vs_full"].mean)
    lines = format_costs(result["by_task"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:3] + lines[-1:]] == ["| full", f"| {lowest}"]
    assert len({line.count("|") for line in lines}) == 1
