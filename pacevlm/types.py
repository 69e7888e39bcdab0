"""Records that pass between the parts of pacevlm."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from pacevlm.errors import ConfigError, ImageError
from pacevlm.images import ImageSource, Picture, PictureConfig, load_image, open_picture
from pacevlm.knobs import Knobs, check_budget_ms, check_price

if TYPE_CHECKING:
    from torch import Tensor

BudgetKind = Literal["e2e", "ttft"]


def other_kind(kind: BudgetKind) -> BudgetKind:
    """The kind of budget that this one is not."""
    return "ttft" if kind == "e2e" else "e2e"


def check_budget_kind(kind: object) -> None:
    """Raise ConfigError unless a kind of budget is known."""
    if kind not in get_args(BudgetKind):
        raise ConfigError(f"budget_kind is {kind!r}; use 'e2e' (whole request) or 'ttft' (time to the first token)")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is asked of a request besides a good answer.

    Attributes:
        budget_ms: how long it may take, milliseconds.
        kind: what of it that covers, the whole request (`e2e`) or the time to the first token (`ttft`).
        price: what time is worth below the budget: points of accuracy for one whole full latency, the median of the
            full configuration. At 0 time costs nothing until the budget is spent; at 10, half a full latency less is
            worth 5 points. It means the same on every device, and on a machine that is slower than profiled.
        other_budget_ms: budget of the other kind, where both must hold.

    Raises:
        BudgetError: a budget is not a positive, finite number.
        ConfigError: the kind is unknown, or the price is no number from 0 to `MAX_PRICE`.
    """

    budget_ms: float
    kind: BudgetKind = "e2e"
    price: float = 0.0
    other_budget_ms: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget_ms", check_budget_ms(self.budget_ms))
        check_budget_kind(self.kind)
        object.__setattr__(self, "price", check_price(self.price))
        if self.other_budget_ms is not None:
            object.__setattr__(self, "other_budget_ms", check_budget_ms(self.other_budget_ms))


@dataclass(frozen=True)
class Example:
    """One picture, question and its reference answers, of a data set.

    Attributes:
        example_id: names the example in reports; what is remembered goes by `content_id`.
        source: the picture as a request is given it: a path, or what is in memory already.
        question: the user's text.
        references: answers that count as right, at least one.
        metadata: what reports break accuracy down by, for example `family` and `digit_height_px`.
        picture_config: how the picture is read.
        where: file and line that it stands on, for messages.
        known_picture_id: its `picture_id`, where the pixels were read already; a file that changes later is refused.
        metric: name of the metric that scores its answers; None for the data set's.
    """

    example_id: str
    source: ImageSource
    question: str
    references: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    picture_config: PictureConfig = field(default_factory=PictureConfig)
    where: str = field(default="", compare=False)
    known_picture_id: str | None = field(default=None, compare=False)
    metric: str | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The options that the question offers, in order; none for an open question."""
        return tuple(self.metadata.get("choices", ()))

    @property
    def picture(self) -> Picture:
        """The picture's header, read anew; raises ImageError."""
        with self.naming():
            return open_picture(self.source, self.picture_config)

    @property
    def image(self) -> Image.Image:
        """The picture's RGB pixels, decoded anew unless they are in memory; raises ImageError.

        So it does for a file whose pixels are not those that `known_picture_id` names.
        """
        with self.naming():
            image = load_image(self.source, self.picture_config)
            if self.known_picture_id is not None and pixel_digest(image) != self.known_picture_id:
                raise ImageError(f"picture {self.source!s} has changed since the data set was read; start again")
        return image

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Put file and line in front of what is said of the picture."""
        try:
            yield
        except ImageError as error:
            raise ImageError(f"{self.where}: {error}" if self.where else str(error)) from error

    @functools.cached_property
    def picture_id(self) -> str:
        """Digest of the RGB pixels, 32 hexadecimal digits, the same whatever file they came from."""
        return self.known_picture_id or pixel_digest(self.image)

    @functools.cached_property
    def content_id(self) -> str:
        """Digest of the pixels and the question, 32 hexadecimal digits: all that an answer depends on besides knobs."""
        return hashlib.sha256(f"{self.picture_id} {self.question}".encode()).hexdigest()[:32]


def pixel_digest(image: Image.Image) -> str:
    """Digest of an RGB picture's size and pixels, 32 hexadecimal digits."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    for top in range(0, image.height, 256):  # the bytes of a whole picture would take twice as much as its pixels
        digest.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """What one tier makes of an image, known from the image's size alone.

    Attributes:
        num_units: what the family cuts it into and the vision encoder's time grows with: crops, patches.
        num_image_tokens: tokens of the prompt.
        num_unit_pairs: units that look at each other, for an encoder whose time grows with their square; 0 where units
            are encoded apart.
    """

    num_units: int
    num_image_tokens: int
    num_unit_pairs: int = 0


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """What a request's latency depends on besides its knobs and its output length.

    Attributes:
        vision: one entry per tier of the knob space, in its order.
        num_text_tokens: tokens of the prompt that are not image tokens, the first (BOS) included.
        num_pixels: pixels of the picture as given.
        picture_kind: what decoding it costs depends on; see `Picture.kind`.
        num_bytes: of the picture's file; 0 for what is in memory.
    """

    vision: tuple[VisionSizes, ...]
    num_text_tokens: int
    num_pixels: int
    picture_kind: str = "memory"
    num_bytes: int = 0


@dataclass(frozen=True)
class RequestView:
    """What is known of a request before any pixel reaches the vision encoder.

    Attributes:
        question_embedding: mean of the prompt's token embeddings, `(d_model,)`, float32 on the CPU.
        sizes: what its latency depends on, known from the picture's size and the question.
        image_size: `(height, width)` in pixels; None for a request without a picture.
        picture: the picture itself, for an optional thumbnail; None for a request without one.
    """

    question_embedding: Tensor
    sizes: RequestSizes
    image_size: tuple[int, int] | None
    picture: Picture | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What running one example with one configuration gave."""

    example_id: str
    knobs: Knobs
    answer: str
    accuracy: float
    num_prompt_tokens: int
    num_output_tokens: int
    predicted_latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Wall-clock milliseconds of one request's stages; `decode_ms` has one entry per generated token after the first.

    `read_ms` covers everything from the path or bytes given to RGB pixels; `prepare_ms` the tokens of the question and
    the cutting of the picture; `first_block_ms` embedding, the first block and stage 2; `prefill_ms` the remaining
    blocks and the first token.
    """

    read_ms: float
    prepare_ms: float
    stage1_ms: float
    vision_ms: float
    first_block_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    e2e_ms: float

    @property
    def ttft_ms(self) -> float:
        """Time to the first token, in milliseconds."""
        return self.e2e_ms - sum(self.decode_ms)

    def covered_ms(self, kind: BudgetKind) -> float:
        """The time that a budget of this kind covers, in milliseconds."""
        return self.e2e_ms if kind == "e2e" else self.ttft_ms


@dataclass(frozen=True)
class Answer:
    """An answer, what it took, and how it kept its budget.

    Attributes:
        answer: the text.
        token_ids: what was generated, end-of-text included.
        knobs: the configuration that ran.
        sizes: what the request's latency depended on.
        vision: what the tier that ran made of the picture.
        times: measured stages; the guardrail and the controller are inside.
        budget_ms: what was asked for; infinite for a request that was given its knobs.
        kind: what the budget covers.
        price: what time was worth below the budget, in points of accuracy per full latency.
        feasible: whether any configuration's upper bound fitted what was left of the budget when the request began;
            where none did, the cheapest ran.
        predicted_ms: the estimator's latency of these knobs at this answer's length, on the machine as profiled, so
            without drift and waiting. None for a request that was given its knobs.
        upper_bound_ms: the bound on the latency that was known beforehand, corrected for drift; infinite where nothing
            is promised. Waiting comes on top.
        drift_factor: how many times the profiled bounds this request's were; 1 where drift is not tracked.
        waited_ms: how much of the budget was gone before the request began, for example waiting for other threads.
        why_infeasible: why nothing was feasible, in a sentence; None where something was.
        other_budget_ms: budget of the other kind, where both had to hold.
    """

    answer: str
    token_ids: tuple[int, ...]
    knobs: Knobs
    sizes: RequestSizes
    vision: VisionSizes
    times: StageTimes
    budget_ms: float = math.inf
    kind: BudgetKind = "e2e"
    price: float = 0.0
    feasible: bool = True
    predicted_ms: float | None = None
    upper_bound_ms: float = math.inf
    drift_factor: float = 1.0
    waited_ms: float = 0.0
    why_infeasible: str | None = None
    other_budget_ms: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, end-of-text included."""
        return len(self.token_ids)

    @property
    def measured_ms(self) -> float:
        """Wall-clock time of what the budget covers, waiting included."""
        return self.waited_ms + self.times.covered_ms(self.kind)

    @property
    def budget_met(self) -> bool:
        """Whether some configuration was expected to fit and the measured time did, of both kinds if both had to."""
        other_ms = self.waited_ms + self.times.covered_ms(other_kind(self.kind))
        is_other_met = self.other_budget_ms is None or other_ms <= self.other_budget_ms
        return self.feasible and self.measured_ms <= self.budget_ms and is_other_met

    def to_dict(self) -> dict[str, Any]:
        """All values and what follows from them, ready for JSON; None for a bound or budget that is infinite."""
        values = dataclasses.asdict(self) | {
            "knobs": str(self.knobs),
            "num_output_tokens": self.num_output_tokens,
            "measured_ms": self.measured_ms,
            "budget_met": self.budget_met,
        }
        return {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}
