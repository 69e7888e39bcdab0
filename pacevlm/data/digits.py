"""Embedded data set: questions about scenes of real handwritten digits, composed on the fly.

The digits are the 1,797 scans of the UCI "Optical Recognition of Handwritten Digits" data set (8 by 8 pixels, values
0 to 16) that scikit-learn ships. Every scan belongs to exactly one split, so an evaluation never shows a scan that
training has seen. A scene holds a few coloured digits of different sizes on a dark canvas; a question asks for one of
the eleven things in `FAMILIES`. Small digits on large canvases need a fine tier, large ones do not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from pacevlm.errors import ConfigError, DataError
from pacevlm.types import Example

SPLITS = ("train", "val", "test")
SPLIT_FRACTIONS = (0.7, 0.1, 0.2)
SPLIT_SEED = 1797

FAMILIES = (
    "digit_of_colour",
    "colour_of_digit",
    "count",
    "count_colour",
    "read",
    "largest",
    "colour_of_largest",
    "right_of",
    "sum",
    "difference",
    "product",
)

COLOURS = {
    "red": (235, 45, 45),
    "green": (45, 205, 70),
    "blue": (60, 105, 255),
    "yellow": (240, 220, 45),
    "purple": (180, 65, 220),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)
COLOUR_JITTER = 12

# (width, height) in pixels
CANVASES = (
    (64, 64),
    (96, 64),
    (64, 96),
    (96, 96),
    (128, 96),
    (96, 128),
    (160, 96),
    (128, 128),
    (160, 128),
    (192, 96),
    (192, 128),
)

SCAN_SIDE_PX = 8
MAX_DIGITS = len(COLOUR_NAMES)
BOX_GAP_PX = 2
# "Left to right" is unambiguous when boxes hardly overlap in x and their centres are well apart.
MAX_X_OVERLAP = 0.3
MIN_CENTRE_DISTANCE = 0.6
LARGEST_RATIO = 1.25
ABSENT_COLOUR_PROBABILITY = 0.25
SUM_DIGITS = range(2, 5)

_MAX_DRAWS = 2000
_PLACEMENT_TRIES = 24
_SHRINK = 0.85

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        value: 0 to 9.
        colour: a name of `COLOUR_NAMES`.
        box: `(left, top, right, bottom)` in pixels, right and bottom exclusive.
        height_px: height of the box.
        scan_index: index of the scan in scikit-learn's data set.
    """

    value: int
    colour: str
    box: Box
    height_px: int
    scan_index: int


@dataclass(frozen=True)
class Scene:
    """A rendered scene: `image` is uint8 `(height, width, 3)`, `digits` are sorted from left to right."""

    image: npt.NDArray[np.uint8]
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Question:
    """One question about a scene; `digit_height_px` is the smallest digit that matters for the answer."""

    family: str
    text: str
    answer: str
    digit_height_px: int


@dataclass(frozen=True)
class SceneConfig:
    """Ranges that scenes are drawn from; a curriculum narrows them.

    On a canvas, heights are further limited to 0.6 of its shorter side. A canvas on which no height remains is never
    drawn.

    Raises:
        ConfigError: a range is empty or outside what is supported, or no canvas remains.
    """

    min_digits: int = 1
    max_digits: int = 4
    min_height_px: int = 8
    max_height_px: int = 40
    canvases: tuple[tuple[int, int], ...] = CANVASES

    def __post_init__(self) -> None:
        # JSON gives lists: fix the types once, here.
        object.__setattr__(self, "canvases", tuple((int(width), int(height)) for width, height in self.canvases))
        if not 1 <= self.min_digits <= self.max_digits <= MAX_DIGITS:
            raise ConfigError(
                f"min_digits={self.min_digits}, max_digits={self.max_digits}: "
                f"need 1 <= min_digits <= max_digits <= {MAX_DIGITS}"
            )
        if not SCAN_SIDE_PX <= self.min_height_px <= self.max_height_px:
            raise ConfigError(
                f"min_height_px={self.min_height_px}, max_height_px={self.max_height_px}: "
                f"need {SCAN_SIDE_PX} <= min_height_px <= max_height_px"
            )
        if not self.usable_canvases:
            raise ConfigError(
                f"no canvas of {self.canvases} can hold digits of {self.min_height_px} to {self.max_height_px} pixels; "
                "add a canvas or widen the heights"
            )

    def height_range_px(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """Smallest and largest digit height on a canvas `(width, height)`; empty when the first exceeds the second."""
        return self.min_height_px, min(self.max_height_px, int(0.6 * min(canvas)))

    @functools.cached_property
    def usable_canvases(self) -> tuple[tuple[int, int], ...]:
        """The canvases on which at least one digit height is allowed."""
        ranges = ((canvas, self.height_range_px(canvas)) for canvas in self.canvases)
        return tuple(canvas for canvas, (smallest, largest) in ranges if smallest <= largest)

    @functools.cached_property
    def possible_families(self) -> tuple[str, ...]:
        """The question families that some scene of these ranges can answer, in the order of `FAMILIES`."""
        impossible = set()
        if self.min_digits >= SUM_DIGITS.stop or self.max_digits < SUM_DIGITS.start:
            impossible.add("sum")
        ranges = [self.height_range_px(canvas) for canvas in self.usable_canvases]
        if self.max_digits < 2 or all(largest < LARGEST_RATIO * smallest for smallest, largest in ranges):
            impossible.update(("largest", "colour_of_largest"))
        if self.max_digits < 2:
            impossible.update(("right_of", "difference", "product"))
        return tuple(family for family in FAMILIES if family not in impossible)


DEFAULT_CONFIG = SceneConfig()


@functools.lru_cache(maxsize=1)
def load_scans() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The scans, uint8 `(1797, 8, 8)` with 255 for full ink, and their values `(1797,)`; both read-only."""
    from sklearn.datasets import load_digits  # costs a second to import, so only when scans are needed

    bundle = load_digits()
    scans = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)
    values = bundle.target.astype(np.int64)
    scans.flags.writeable = False
    values.flags.writeable = False
    return scans, values


@functools.lru_cache(maxsize=1)
def split_scans() -> dict[str, tuple[tuple[int, ...], ...]]:
    """For every split, the scan indices of each of the ten values: a fixed permutation, stratified by value."""
    _, values = load_scans()
    rng = np.random.default_rng(SPLIT_SEED)
    splits: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
    for value in range(10):
        indices = rng.permutation(np.flatnonzero(values == value)).tolist()
        num_train = round(SPLIT_FRACTIONS[0] * len(indices))
        num_val = round(SPLIT_FRACTIONS[1] * len(indices))
        splits["train"].append(tuple(indices[:num_train]))
        splits["val"].append(tuple(indices[num_train : num_train + num_val]))
        splits["test"].append(tuple(indices[num_train + num_val :]))
    return {split: tuple(by_value) for split, by_value in splits.items()}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"the digits data set has no split {split!r}; choose one of {', '.join(SPLITS)}")


def sample_scene(rng: np.random.Generator, split: str, config: SceneConfig = DEFAULT_CONFIG) -> Scene:
    """Draw and render one scene with scans of one split.

    Raises:
        DataError: there is no such split.
        ConfigError: digits of these ranges do not fit on any canvas.
    """
    _check_split(split)
    canvas, digits = _sample_layout(rng, split, config)
    return Scene(render(rng, canvas, digits), digits)


def _sample_layout(
    rng: np.random.Generator, split: str, config: SceneConfig
) -> tuple[tuple[int, int], tuple[Digit, ...]]:
    """Draw a canvas `(width, height)` and its digits, without rendering them."""
    for _ in range(_MAX_DRAWS):
        canvas = config.usable_canvases[rng.integers(len(config.usable_canvases))]
        num_digits = int(rng.integers(config.min_digits, config.max_digits + 1))
        boxes = _sample_boxes(rng, canvas, num_digits, config.height_range_px(canvas))
        if boxes is None:
            continue
        # Half of the scenes repeat no colour, so that questions about "the red digit" stay frequent.
        distinct = rng.random() < 0.5
        if distinct:
            colours = rng.permutation(len(COLOUR_NAMES))[:num_digits]
        else:
            colours = rng.integers(len(COLOUR_NAMES), size=num_digits)
        by_value = split_scans()[split]
        digits = []
        for box, colour in zip(boxes, colours.tolist(), strict=True):
            value = int(rng.integers(10))
            scan_index = by_value[value][rng.integers(len(by_value[value]))]
            digits.append(Digit(value, COLOUR_NAMES[colour], box, box[3] - box[1], scan_index))
        digits.sort(key=lambda digit: digit.box[0] + digit.box[2])
        return canvas, tuple(digits)
    raise ConfigError(
        f"{config.min_digits} digits of {config.min_height_px} pixels or more do not fit on any canvas of "
        f"{config.usable_canvases}; lower min_digits or min_height_px, or add a larger canvas"
    )


def _sample_boxes(
    rng: np.random.Generator, canvas: tuple[int, int], num_digits: int, height_range_px: tuple[int, int]
) -> list[Box] | None:
    """Draw boxes that keep apart, shrinking them when they do not fit; None when the smallest do not fit either."""
    smallest, largest = height_range_px
    log_heights = rng.uniform(math.log(smallest), math.log(largest), size=num_digits)
    # The tallest digit is placed first: it has the fewest places to go.
    heights = sorted((round(height) for height in np.exp(log_heights).tolist()), reverse=True)
    aspects = rng.uniform(0.85, 1.0, size=num_digits).tolist()
    while True:
        boxes: list[Box] = []
        for height, aspect in zip(heights, aspects, strict=True):
            width = round(height * aspect)
            if width > canvas[0] or height > canvas[1]:
                break
            for x, y in rng.random((_PLACEMENT_TRIES, 2)).tolist():
                left = int(x * (canvas[0] - width + 1))
                top = int(y * (canvas[1] - height + 1))
                box = (left, top, left + width, top + height)
                if all(_keep_apart(box, other) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == num_digits:
            return boxes
        if heights[0] == smallest:
            return None
        heights = [max(smallest, int(height * _SHRINK)) for height in heights]


def _keep_apart(a: Box, b: Box) -> bool:
    """Whether two boxes leave a gap between them and have a clear order from left to right."""
    width_a, width_b = a[2] - a[0], b[2] - b[0]
    x_overlap = min(a[2], b[2]) - max(a[0], b[0])
    y_overlap = min(a[3], b[3]) - max(a[1], b[1])
    if x_overlap > -BOX_GAP_PX and y_overlap > -BOX_GAP_PX:
        return False
    centre_distance = abs(a[0] + a[2] - b[0] - b[2]) / 2
    return (
        x_overlap <= MAX_X_OVERLAP * min(width_a, width_b)
        and centre_distance >= MIN_CENTRE_DISTANCE * (width_a + width_b) / 2
    )


def render(rng: np.random.Generator, canvas: tuple[int, int], digits: Sequence[Digit]) -> npt.NDArray[np.uint8]:
    """Paint digits on a noisy dark canvas: uint8 `(height, width, 3)`."""
    width, height = canvas
    scans, _ = load_scans()
    level, noise = rng.uniform(0, 70), rng.uniform(1, 5)
    background = level + noise * rng.standard_normal((height, width, 1), dtype=np.float32)
    image = np.repeat(background.astype(np.float32), 3, axis=2)
    for digit in digits:
        left, top, right, bottom = digit.box
        scan = Image.fromarray(scans[digit.scan_index])
        resized = scan.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        ink = np.asarray(resized, dtype=np.float32)[..., None] / 255.0
        jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
        colour = np.asarray(COLOURS[digit.colour], dtype=np.float32) + jitter.astype(np.float32)
        patch = image[top:bottom, left:right]
        patch += ink * (colour - patch)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def valid_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every family that applies to a scene, once each, with a randomly chosen colour or digit to ask about."""
    return _questions(scene.digits, rng)


def _questions(digits: Sequence[Digit], rng: np.random.Generator) -> list[Question]:
    colour_counts = Counter(digit.colour for digit in digits)
    value_counts = Counter(digit.value for digit in digits)
    smallest = min(digit.height_px for digit in digits)
    questions = []

    candidates = [digit for digit in digits if colour_counts[digit.colour] == 1]
    if candidates:
        digit = candidates[rng.integers(len(candidates))]
        text = f"Which digit is {digit.colour}?"
        questions.append(Question("digit_of_colour", text, str(digit.value), digit.height_px))

    candidates = [digit for digit in digits if value_counts[digit.value] == 1]
    if candidates:
        digit = candidates[rng.integers(len(candidates))]
        text = f"What colour is the {digit.value}?"
        questions.append(Question("colour_of_digit", text, digit.colour, digit.height_px))

    questions.append(Question("count", "How many digits are there?", str(len(digits)), smallest))

    absent = [colour for colour in COLOUR_NAMES if colour not in colour_counts]
    present = [colour for colour in COLOUR_NAMES if colour in colour_counts]
    asked = absent if absent and rng.random() < ABSENT_COLOUR_PROBABILITY else present
    colour = asked[rng.integers(len(asked))]
    text = f"How many {colour} digits are there?"
    questions.append(Question("count_colour", text, str(colour_counts[colour]), smallest))

    text = "Read the digits from left to right."
    questions.append(Question("read", text, " ".join(str(digit.value) for digit in digits), smallest))

    if len(digits) >= 2:
        second, first = sorted(digits, key=lambda digit: digit.height_px)[-2:]
        if first.height_px >= LARGEST_RATIO * second.height_px:
            text = "Which digit is the largest?"
            questions.append(Question("largest", text, str(first.value), first.height_px))
            text = "What colour is the largest digit?"
            questions.append(Question("colour_of_largest", text, first.colour, first.height_px))

    # Digits are sorted from left to right, so that the next one stands right of this one.
    followed = [(digit, right) for digit, right in itertools.pairwise(digits) if colour_counts[digit.colour] == 1]
    if followed:
        digit, right = followed[rng.integers(len(followed))]
        text = f"Which digit is right of the {digit.colour} digit?"
        height_px = min(digit.height_px, right.height_px)
        questions.append(Question("right_of", text, str(right.value), height_px))

    single = [digit for digit in digits if colour_counts[digit.colour] == 1]
    if len(single) >= 2:
        for family in ("difference", "product"):
            first, second = (single[i] for i in rng.permutation(len(single))[:2])
            text = f"What is the {family} of the {first.colour} digit and the {second.colour} digit?"
            value = abs(first.value - second.value) if family == "difference" else first.value * second.value
            height_px = min(first.height_px, second.height_px)
            questions.append(Question(family, text, str(value), height_px))

    if len(digits) in SUM_DIGITS:
        total = sum(digit.value for digit in digits)
        questions.append(Question("sum", "What is the sum of the digits?", str(total), smallest))
    return questions


def scene_about(
    rng: np.random.Generator, split: str, family: str, config: SceneConfig = DEFAULT_CONFIG
) -> tuple[Scene, Question]:
    """Draw scenes until one can answer a question of a family; only that one is rendered.

    Raises:
        ConfigError: no scene of these ranges answered such a question.
    """
    for _ in range(_MAX_DRAWS):
        canvas, digits = _sample_layout(rng, split, config)
        for question in _questions(digits, rng):
            if question.family == family:
                return Scene(render(rng, canvas, digits), digits), question
    raise ConfigError(f"no scene of {config} answered a question of family {family!r}; widen the ranges")


class DigitVQA(Sequence[Example]):
    """A fixed sequence of digit questions; example `i` depends on (split, seed, i, config) only, and is made on access.

    The family of each example is drawn uniformly from `config.possible_families`; scenes are then drawn until one can
    answer it. `metadata` holds `family`, `num_digits`, `digit_height_px` (the smallest digit that matters for the
    answer) and `canvas` (`"widthxheight"`).

    Raises:
        DataError: there is no such split, or `num_examples` or `seed` is negative.
    """

    def __init__(self, split: str, num_examples: int, seed: int = 0, config: SceneConfig = DEFAULT_CONFIG) -> None:
        _check_split(split)
        if num_examples < 0 or seed < 0:
            raise DataError(f"num_examples={num_examples} and seed={seed} must not be negative")
        self.split = split
        self.num_examples = num_examples
        self.seed = seed
        self.config = config

    @property
    def _name(self) -> str:
        """What the ids of examples begin with."""
        return "digits"

    def _more_metadata(self, index: int) -> dict[str, Any]:
        """What an example's metadata says besides its scene and family."""
        return {}

    def __len__(self) -> int:
        return self.num_examples

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.num_examples))]
        scene, question = self.scene_and_question(index)
        height, width = scene.image.shape[:2]
        metadata: dict[str, Any] = {
            "family": question.family,
            "num_digits": len(scene.digits),
            "digit_height_px": question.digit_height_px,
            "canvas": f"{width}x{height}",
            **self._more_metadata(index),
        }
        example_id = f"{self._name}-{self.split}-{self.seed}-{self._position(index)}"
        return Example(example_id, Image.fromarray(scene.image), question.text, (question.answer,), metadata)

    def _position(self, index: int) -> int:
        position = index + self.num_examples if index < 0 else index
        if not 0 <= position < self.num_examples:
            raise IndexError(f"example {index} of a data set with {self.num_examples} examples")
        return position

    def scene_and_question(self, index: int) -> tuple[Scene, Question]:
        """The scene behind an example and its question; raises IndexError outside the data set."""
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, self._position(index)])
        families = self.config.possible_families
        return scene_about(rng, self.split, families[rng.integers(len(families))], self.config)
