"""Tasks of the embedded data set, as real traffic has several applications, and the mixtures that they are asked in.

Each task asks something else of a model, so that what one can do without another needs: *detail* fine tiers, *thought*
all blocks, *knowledge* all experts, *overview* none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pacevlm.data.digits import CANVASES, SPLITS, DigitVQA, Question, Scene, SceneConfig, scene_about
from pacevlm.data.elements import ELEMENT_FAMILIES, element_questions, sample_number
from pacevlm.errors import DataError
from pacevlm.mixture import parse_mixture
from pacevlm.types import Example


@dataclass(frozen=True)
class Task:
    """One application's traffic.

    Attributes:
        name: what mixtures and metadata call it.
        families: what it asks, each equally often.
        scenes: what its pictures are like.
    """

    name: str
    families: tuple[str, ...]
    scenes: SceneConfig

    def draw(self, rng: np.random.Generator, split: str) -> tuple[Scene, Question]:
        """One scene of this task with a question about it."""
        family = self.families[rng.integers(len(self.families))]
        if family not in ELEMENT_FAMILIES:
            return scene_about(rng, split, family, self.scenes)
        scene = sample_number(rng, split, self.scenes)
        (question,) = [question for question in element_questions(scene.digits) if question.family == family]
        return scene, question


# All tasks' pictures have the same sizes, or these would tell the tasks apart. Low tiers shrink them, so what shall not
# need the higher ones has to be tall.
_CANVASES, _TALL_PX = CANVASES[4:], 32

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "detail",
            ("digit_of_colour", "colour_of_digit"),
            SceneConfig(max_digits=4, min_height_px=8, max_height_px=11, canvases=_CANVASES),
        ),
        Task(
            "thought",
            ("right_of", "difference", "product"),
            SceneConfig(min_digits=2, max_digits=4, min_height_px=_TALL_PX, canvases=_CANVASES),
        ),
        Task(
            "overview",
            ("digit_of_colour", "colour_of_digit", "count_colour"),
            SceneConfig(max_digits=3, min_height_px=_TALL_PX, canvases=_CANVASES),
        ),
        Task(
            "knowledge",
            ELEMENT_FAMILIES,
            SceneConfig(min_digits=2, max_digits=2, min_height_px=_TALL_PX, canvases=_CANVASES),
        ),
    )
}


class DigitTaskVQA(DigitVQA):
    """Digit questions of several tasks; example `i` depends on (split, seed, i, mixture) only, and is made on access.

    The task of each example is drawn by the mixture's weights, its family evenly from the task's. `metadata` says the
    `task` besides what `DigitVQA` says.

    Args:
        split: whose scans are shown.
        num_examples: how many examples.
        mixture: a mixture with tasks, as in `DataConfig`.
        seed: which examples are composed.

    Raises:
        DataError: there is no such split, the mixture has no tasks, or `num_examples` or `seed` is negative.
        ConfigError: there is no such mixture.
    """

    def __init__(self, split: str, num_examples: int, mixture: str, seed: int = 0) -> None:
        super().__init__(split, num_examples, seed)
        parsed = parse_mixture(mixture)
        if not parsed.weights:
            raise DataError(f"the mixture {parsed.name!r} has no tasks; `DigitVQA` is what it asks")
        self.mixture = parsed
        self._tasks = [TASKS[name] for name in parsed.weights]
        self._ends = np.cumsum(list(parsed.weights.values())) / sum(parsed.weights.values())

    @property
    def _name(self) -> str:
        return f"digits-{self.mixture.name}"

    def _more_metadata(self, index: int) -> dict[str, Any]:
        return {"task": self._task_and_rng(index)[0].name}

    def _task_and_rng(self, index: int) -> tuple[Task, np.random.Generator]:
        # The last number sets these examples apart from those of `DigitVQA`.
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, self._position(index), 1])
        place = int(np.searchsorted(self._ends, rng.random(), side="right"))
        return self._tasks[min(place, len(self._tasks) - 1)], rng

    def scene_and_question(self, index: int) -> tuple[Scene, Question]:
        """The scene behind an example and its question; raises IndexError outside the data set."""
        task, rng = self._task_and_rng(index)
        return task.draw(rng, self.split)


def load_digits(split: str, num_examples: int, mixture: str | None = None, seed: int = 0) -> Sequence[Example]:
    """The questions of one split in a mixture, the default one if None.

    Raises:
        DataError: there is no such split, or `num_examples` or `seed` is negative.
        ConfigError: there is no such mixture.
    """
    parsed = parse_mixture(mixture)
    if not parsed.weights:
        return DigitVQA(split, num_examples, seed)
    return DigitTaskVQA(split, num_examples, parsed.name, seed)
