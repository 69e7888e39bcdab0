"""What each knob is worth: accuracy with one knob changed and the others full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pacevlm.evaluation.statistics import bootstrap_mean, paired_bootstrap
from pacevlm.knobs import Knobs
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example
from recipes.embedded_model.breakdown import accuracy_table


def one_knob_at_a_time(engine: RolloutEngine) -> dict[str, list[Knobs]]:
    """The full configuration with each knob lowered step by step, and the cheapest one."""
    space = engine.model.knob_space
    full = space.full
    return {
        "tier": [Knobs(tier, full.top_k, full.num_blocks) for tier in reversed(space.tiers)],
        "top_k": [Knobs(full.tier, k, full.num_blocks) for k in reversed(space.top_ks)],
        "num_blocks": [Knobs(full.tier, full.top_k, n) for n in reversed(space.num_blocks)],
        "all": [full, space.cheapest],
    }


def measure_knob_effects(
    engine: RolloutEngine, examples: Sequence[Example], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Accuracy of each one-knob change with its 95 % interval and paired difference from full knobs.

    Returns:
        `{"n", "full": {"accuracy", "by_family_and_height"}, "by_knob": {knob: [{"knobs", "accuracy", "vs_full"}]},
        "tier_by_family": {family: {tier: accuracy}}, "tier_by_height": {bin: {tier: accuracy}}}`.
    """
    settings = one_knob_at_a_time(engine)
    wanted = sorted({knobs for values in settings.values() for knobs in values}, key=str)
    outcomes = engine.run([(example, knobs) for knobs in wanted for example in examples], progress)
    accuracy = np.array([outcome.accuracy for outcome in outcomes]).reshape(len(wanted), len(examples))
    arrays = dict(zip(wanted, accuracy, strict=True))
    full = engine.model.knob_space.full
    by_knob = {
        knob: [
            {
                "knobs": str(value),
                "accuracy": bootstrap_mean(arrays[value], seed=0),
                "vs_full": paired_bootstrap(arrays[value], arrays[full], seed=0),
            }
            for value in values
        ]
        for knob, values in settings.items()
    }
    tables = {
        knobs.tier: accuracy_table((e.metadata, a) for e, a in zip(examples, arrays[knobs], strict=True))
        for knobs in settings["tier"]
    }
    families = tables[full.tier]
    return {
        "n": len(examples),
        "full": {"accuracy": by_knob["tier"][0]["accuracy"], "by_family_and_height": families},
        "by_knob": by_knob,
        "tier_by_family_and_height": tables,
    }
