"""What each knob is worth: accuracy with one knob changed and the others full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        "tier_by_family_and_height": {tier: table}, "by_task": `cost_by_task`, where examples say their task}`.
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
    tasks = [str(example.metadata["task"]) for example in examples if "task" in example.metadata]
    by_task = cost_by_task(tasks, settings, arrays) if len(tasks) == len(examples) else None
    return {
        "n": len(examples),
        "full": {"accuracy": by_knob["tier"][0]["accuracy"], "by_family_and_height": families},
        "by_knob": by_knob,
        "tier_by_family_and_height": tables,
        **({} if by_task is None else {"by_task": by_task}),
    }


def cost_by_task(
    tasks: Sequence[str], settings: Mapping[str, Sequence[Knobs]], accuracy: Mapping[Knobs, NDArray[np.float64]]
) -> dict[str, Any]:
    """What each knob costs each task, at every value with the others full.

    Args:
        tasks: the task of each example.
        settings: for each knob its configurations, the full one first.
        accuracy: of each configuration, one number an example.

    Returns:
        `{task: {"n", "full", "cost": {knob: {knobs: paired difference from full knobs}}}}`, with 95 % intervals.
    """
    names = np.array(tasks)
    table: dict[str, Any] = {}
    for task in dict.fromkeys(sorted(tasks)):
        of_task = {knobs: values[names == task] for knobs, values in accuracy.items()}
        full = settings["tier"][0]
        cost = {
            knob: {str(value): paired_bootstrap(of_task[value], of_task[full], seed=0) for value in values[1:]}
            for knob, values in settings.items()
        }
        table[task] = {"n": int((names == task).sum()), "full": bootstrap_mean(of_task[full], seed=0), "cost": cost}
    return table


def format_costs(by_task: Mapping[str, Any]) -> str:
    """Markdown of `cost_by_task`: a line per configuration, a column per task, in points with 95 % intervals."""
    titles = [f"{task} (n = {facts['n']})" for task, facts in by_task.items()]
    lines = [["knobs", *titles], ["---"] * (1 + len(titles))]
    full = [facts["full"] for facts in by_task.values()]
    lines.append(["full", *(f"{100 * a.mean:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]" for a in full)])
    costs = [facts["cost"] for facts in by_task.values()]
    for knob in costs[0]:
        for value in costs[0][knob]:
            differences = [cost[knob][value] for cost in costs]
            texts = [f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in differences]
            lines.append([value, *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
