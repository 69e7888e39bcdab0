"""Whether there was anything to learn: what was seen where there was not, and what to check, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.types import Example

MIN_LEARNED_SHARE = 0.01
"""Share of training groups with unequal scores below which a controller has hardly been taught anything."""
_MOST_SHOWN = 120


def sweep_warnings(accuracy: NDArray[np.float64], example: Example, answer: str) -> list[str]:
    """Of training examples that ran with every configuration, `(examples, configurations)`.

    Args:
        example: one of them.
        answer: what the model answered to it with the full configuration.
    """
    num_examples, num_configurations = accuracy.shape
    if (accuracy != accuracy[:, :1]).any():
        return []
    seen = f"each of {num_examples} training examples scored the same with all {num_configurations} configurations"
    if not accuracy.any():
        seen = f"none of {num_examples} training examples was answered right with any of {num_configurations} "
        seen += "configurations"
    elif (accuracy == 1).all():
        seen = f"all {num_examples} training examples were answered right with every configuration"
    return [_sentence(f"{seen}, so there is nothing to learn", example, answer)]


def training_warnings(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the metrics of all steps of a training run."""
    # Not rewards: at a price of time these differ where answers do not.
    shares = [1.0 - step["frac_accuracy_zero_std"] for step in metrics if "frac_accuracy_zero_std" in step]
    share = float(np.mean(shares)) if shares else 1.0
    if share >= MIN_LEARNED_SHARE:
        return []
    seen = "no group of rollouts" if not share else f"only {100 * share:.2g} % of the groups of rollouts"
    return [
        f"{seen} in {len(shares)} training steps had unequal scores, so the controller learned next to nothing; check "
        "that some answers are right and some wrong (metric, references, prompt), and that budgets from "
        "train.min_budget to train.max_budget leave a choice"
    ]


def evaluation_warnings(records: Sequence[EvaluationRecord], examples: Sequence[Example]) -> list[str]:
    """Of the records of all policies, which are of these examples."""
    if any(record.accuracy for record in records) or not records:
        return []
    example = next(example for example in examples if example.example_id == records[0].example_id)
    seen = f"none of {len(examples)} test examples was answered right by any policy"
    return [_sentence(f"{seen}, so the policies cannot be compared", example, str(records[0].metadata.get("answer")))]


def importance_warnings(accuracy: float, num_examples: int, example: Example, answer: str) -> list[str]:
    """Of the accuracy with all blocks."""
    if accuracy:
        return []
    seen = f"none of {num_examples} examples was answered right with all blocks, so their order says nothing"
    return [_sentence(seen, example, answer)]


def _sentence(seen: str, example: Example, answer: str) -> str:
    question, given = _quoted(example.question), _quoted(answer)
    references = " or ".join(map(_quoted, example.references[:3]))
    return (
        f"{seen}; check the metric, the references and the prompt: to {question}, for example, the reference is "
        f"{references} and the answer was {given}"
    )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…")
