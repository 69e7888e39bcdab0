from __future__ import annotations

from pacevlm.data.digits import DigitVQA
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.engine import RolloutEngine
from recipes.embedded_model.knob_effects import measure_knob_effects, one_knob_at_a_time


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
