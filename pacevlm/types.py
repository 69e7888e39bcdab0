"""Records that pass between the parts of pacevlm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from pacevlm.knobs import Knobs

BudgetKind = Literal["e2e", "ttft"]


@dataclass(frozen=True)
class Example:
    """One image, question and reference answer of a data set.

    `metadata` holds what reports break accuracy down by, for example `family` and `digit_height_px`.
    """

    example_id: str
    image: Image.Image
    question: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """What one tier makes of an image, known from the image's size alone."""

    num_crops: int
    num_image_tokens: int


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """What a request's latency depends on besides its knobs and its output length.

    Attributes:
        vision: one entry per tier of the knob space, in its order.
        num_text_tokens: tokens of the prompt that are not image tokens, the first (BOS) included.
        num_pixels: pixels of the image as given.
    """

    vision: tuple[VisionSizes, ...]
    num_text_tokens: int
    num_pixels: int


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

    `first_block_ms` covers embedding, the first block and stage 2; `prefill_ms` the remaining blocks and the first
    token.
    """

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
