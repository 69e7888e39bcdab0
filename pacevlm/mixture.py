"""What the embedded data set is asked: its tasks, and the mixtures of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pacevlm.checks import shown
from pacevlm.errors import ConfigError

TASKS = ("detail", "thought", "overview", "knowledge")
"""The tasks of `digits`; those of `data.digit_tasks.TASKS`, which a test compares."""
MIXTURES: Mapping[str, Mapping[str, float]] = {"uniform": {}, "crossed": dict.fromkeys(TASKS, 1.0)}
"""What `digits` is asked, by name: the weights of tasks, or all families evenly where there are none."""
DEFAULT_MIXTURE = "crossed"
MAX_WEIGHT = 1e6
"""Largest weight of a task, and the inverse of the smallest."""


@dataclass(frozen=True)
class Mixture:
    """How often each task is asked.

    Attributes:
        name: one of `MIXTURES`, or the weights in one spelling, such as `detail=1,thought=2`.
        weights: of the tasks asked, all above 0, in the order of `TASKS`; none where tasks play no part.
    """

    name: str
    weights: Mapping[str, float]


def parse_mixture(text: object = None) -> Mixture:
    """Read a mixture: None for the default one, a name of `MIXTURES`, or weights such as `detail=1,thought=2`.

    Raises:
        ConfigError: it is neither, names a task twice, or a weight is no number from 1e-06 to 1e+06.
    """
    text = DEFAULT_MIXTURE if text is None else text
    if isinstance(text, str) and text in MIXTURES:
        return Mixture(text, MIXTURES[text])
    entries = [entry.partition("=") for entry in text.split(",")] if isinstance(text, str) else []
    given = {task.strip(): _weight(weight.strip()) for task, _, weight in entries}
    if (
        not entries
        or len(given) < len(entries)
        or any(task not in TASKS for task in given)
        or any(not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT for weight in given.values())
    ):
        raise ConfigError(
            f"mixture is {shown(text)}; it must be {', '.join(MIXTURES)}, or weights above 0 of some of the tasks "
            f"{', '.join(TASKS)}, for example 'detail=1,thought=2'"
        )
    weights = {task: given[task] for task in TASKS if task in given}
    for name, named in MIXTURES.items():
        if weights == named:
            return Mixture(name, weights)
    return Mixture(",".join(f"{task}={repr(weight).removesuffix('.0')}" for task, weight in weights.items()), weights)


def _weight(text: str) -> float:
    """The number that a weight's text says, 0 if it says none."""
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{0,9})?|\.\d{1,9}", text, re.ASCII) else 0.0
