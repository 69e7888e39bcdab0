"""What was seen, and what to check, is said where there was nothing to learn, and only there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pacevlm.evaluation.learnable import (
    evaluation_warnings,
    importance_warnings,
    sweep_warnings,
    training_warnings,
)
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.knobs import Knobs
from pacevlm.types import Example

EXAMPLE = Example("a", Image.new("RGB", (8, 8)), "How many?\x1b[2J", ("seven", "7"))
CHECKED = ("metric", "references", "prompt", r"'How many?\x1b[2J'", "'seven' or '7'", "'eight'")


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        (np.zeros((5, 3)), "none of 5 training examples was answered right with any of 3 configurations"),
        (np.ones((5, 3)), "all 5 training examples were answered right with every configuration"),
        (np.repeat([[0.0], [1.0], [0.5]], 3, axis=1), "each of 3 training examples scored the same with all 3"),
    ],
)
def test_a_sweep_in_which_knobs_change_nothing(accuracy: np.ndarray, message: str) -> None:
    (sentence,) = sweep_warnings(accuracy, EXAMPLE, "eight")
    assert sentence.startswith(message)
    for part in CHECKED:
        assert part in sentence
    changed = accuracy.copy()
    changed[0, 1] = 0.25
    assert sweep_warnings(changed, EXAMPLE, "eight") == []


def test_training_without_unequal_rewards() -> None:
    dull, lively = {"frac_accuracy_zero_std": 1.0}, {"frac_accuracy_zero_std": 0.4}
    (sentence,) = training_warnings([dull] * 4)
    assert sentence.startswith("no group of rollouts in 4 training steps had unequal scores")
    assert "metric, references, prompt" in sentence
    (sentence,) = training_warnings([dull] * 199 + [lively])
    assert sentence.startswith("only 0.3 % of the groups of rollouts in 200 training steps")
    assert training_warnings([lively, dull]) == []
    assert training_warnings([]) == []


def test_an_evaluation_without_a_right_answer() -> None:
    record = EvaluationRecord(
        policy="full",
        fraction=1.0,
        budget_ms=50.0,
        example_id="a",
        knobs=Knobs("low", 2, 3),
        accuracy=0.0,
        latency_ms=None,
        predicted_latency_ms=4.0,
        feasible=True,
        metadata={"answer": "eight"},
    )
    (sentence,) = evaluation_warnings([record, dataclasses.replace(record, policy="oracle")], [EXAMPLE])
    assert sentence.startswith("none of 1 test examples was answered right by any policy")
    for part in CHECKED:
        assert part in sentence
    assert evaluation_warnings([record, dataclasses.replace(record, policy="oracle", accuracy=1.0)], [EXAMPLE]) == []


def test_an_importance_without_a_right_answer() -> None:
    (sentence,) = importance_warnings(0.0, 9, EXAMPLE, "eight")
    assert sentence.startswith("none of 9 examples was answered right with all blocks")
    for part in CHECKED:
        assert part in sentence
    assert importance_warnings(0.1, 9, EXAMPLE, "eight") == []


def test_long_texts_are_cut() -> None:
    long = dataclasses.replace(EXAMPLE, question="q" * 5000, references=("r" * 5000,) * 50)
    (sentence,) = importance_warnings(0.0, 9, long, "x" * 5000)
    assert len(sentence) < 1000
