"""The tables of a study follow from its records alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pacevlm.errors import DataError
from pacevlm.evaluation.worth import StudyRecords, format_worth, measure_worth
from pacevlm.files import save_safetensors_atomic

NUM = 40
POLICIES = ("lookup_table", "predictor", "controller 0", "controller 1", "no-mask 0", "rebased 0", "rebased 1")
LEARNABLE = {"mean": 5.0, "low": 4.0, "high": 6.0}


def make_records(profile: str = "a", *, gain: float = 0.1, learnable: float = 5.0) -> StudyRecords:
    """Two controllers that answer `gain` more of the questions right than the table, at two budgets."""
    shares = np.array([0.5, 0.9, 0.5 + gain, 0.5 + gain, 0.5 + gain / 2, 0.3 + gain, 0.5 + gain])
    right = (np.arange(NUM) / NUM)[None, None] < shares[:, None, None]
    accuracy = np.repeat(right.astype(float), 2, axis=1)
    latency_ms = np.full(accuracy.shape, 8.0)
    latency_ms[2, 0, :10] = 11.0  # one controller of two is late on a quarter of the questions at the first budget
    feasible = np.ones((2, NUM), dtype=bool)
    feasible[0, 20:] = False
    front_accuracy = np.broadcast_to(np.linspace(0.9, 0.5, 3)[None, :, None], (4, 3, NUM)).copy()
    front_ms = np.broadcast_to(np.array([20.0, 15.0, 16.0, 12.0])[:, None, None] * np.ones((3, 1)), (4, 3, NUM)).copy()
    return StudyRecords(
        profile=profile,
        seeds=(0, 1),
        fractions=(0.5, 1.0),
        budgets_ms=(10.0, 20.0),
        prices=(0.0, 2.0, 8.0),
        policies=POLICIES,
        tasks=("even", "odd") * (NUM // 2),
        learnable=LEARNABLE | {"mean": learnable},
        ablations=("no-mask",),
        accuracy=accuracy,
        latency_ms=latency_ms,
        feasible=feasible,
        front_accuracy=front_accuracy,
        front_ms=front_ms,
        full_accuracy=np.full(NUM, 0.9),
        knob_accuracy=np.stack([np.tile([0.9, 0.5], NUM // 2), np.full(NUM, 0.8), np.full(NUM, 0.9)]),
    )


def test_gains_are_over_the_table_on_the_same_questions() -> None:
    found = measure_worth([make_records(), make_records("b", gain=0.2)])
    assert found["n"] == NUM
    assert found["gain_points"]["mean"] == pytest.approx(10.0)
    assert found["gain_points"]["low"] < 10.0 < found["gain_points"]["high"]
    assert [gain["mean"] for gain in found["seed_gains"]] == pytest.approx([10.0, 10.0])
    assert {name: gain["mean"] for name, gain in found["profile_gains"].items()} == pytest.approx(
        {"a": 10.0, "b": 20.0}
    )
    assert found["gain_at"]["0.5"]["mean"] == pytest.approx(10.0)
    assert found["share_of_learnable"] == pytest.approx(2.0)
    assert found["gains"]["predictor"]["mean"] == pytest.approx(40.0)
    assert found["ablations"]["no-mask"]["gain_points"]["mean"] == pytest.approx(5.0)
    whole = np.mean([gain["mean"] for gain in found["seed_gains"][: len(found["ablations"]["no-mask"]["seed_gains"])]])
    assert found["ablations"]["no-mask"]["less_whole"]["mean"] == pytest.approx(5.0 - whole)
    assert found["policies"]["controller"][0]["mean"] == pytest.approx(60.0)
    assert {name: loss["mean"] for name, loss in found["rebased_less_trained"].items()} == pytest.approx({"b": -10.0})
    json.dumps(found, allow_nan=False)


def test_nothing_learnable_is_no_share_of_it() -> None:
    found = measure_worth([make_records(learnable=0.0)])
    assert found["share_of_learnable"] is None
    assert "reached" not in format_worth({"crossed": found})


def test_late_counts_where_anything_fits() -> None:
    late = measure_worth([make_records()])["late"]
    # Ten of the twenty feasible questions, with one of two seeds.
    assert late["0.5"]["mean"] == pytest.approx(0.25)
    assert late["0.5"]["infeasible"] == pytest.approx(0.5)
    assert late["1"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "infeasible": 0.0}
    nothing = dataclasses.replace(make_records(), feasible=np.zeros((2, NUM), dtype=bool))
    assert measure_worth([nothing])["late"]["1"] == {"mean": None, "low": None, "high": None, "infeasible": 1.0}


def test_a_knob_costs_each_task_what_full_accuracy_loses() -> None:
    costs = measure_worth([make_records()])["knob_costs"]
    assert costs["even"] == pytest.approx({"tier": 0.0, "top_k": 10.0, "num_blocks": 0.0})
    assert costs["odd"] == pytest.approx({"tier": 40.0, "top_k": 10.0, "num_blocks": 0.0})


def test_latency_is_compared_at_equal_accuracy() -> None:
    worth = measure_worth([make_records()])
    # The controllers' fronts are 16 and 12 ms, 14 on average, the predictor's 15, the table's 20.
    for name, expected in (("latency_at_equal_accuracy", 0.7), ("predictor_latency_at_equal_accuracy", 0.75)):
        found = {points: ratio["mean"] for points, ratio in worth[name].items()}
        assert found == pytest.approx(dict.fromkeys("246", expected))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, records = tmp_path / "records.safetensors", make_records()
    assert StudyRecords.load(path) is None
    records.save(path, {"steps": "2"})
    read = StudyRecords.load(path, {"steps": "2"})
    assert read is not None
    assert measure_worth([read]) == measure_worth([records])
    assert StudyRecords.load(path, {"steps": "3"}) is None  # made with other settings
    save_safetensors_atomic({}, path, {"kind": "something else"})
    with pytest.raises(DataError, match="does not hold the records of a study"):
        StudyRecords.load(path)


def test_text_names_every_traffic() -> None:
    text = format_worth({"commit": "0", "crossed": measure_worth([make_records()])})
    assert text.startswith("crossed: 40 questions, seeds 0, 1")
    assert "+10.00" in text
    assert "no-mask" in text
