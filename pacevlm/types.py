"""Records that pass between the parts of pacevlm."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from pacevlm.errors import ImageError
from pacevlm.images import ImageSource, Picture, PictureConfig, load_image, open_picture
from pacevlm.knobs import Knobs

BudgetKind = Literal["e2e", "ttft"]


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
    """

    example_id: str
    source: ImageSource
    question: str
    references: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    picture_config: PictureConfig = field(default_factory=PictureConfig)
    where: str = field(default="", compare=False)
    known_picture_id: str | None = field(default=None, compare=False)

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
    """What one tier makes of an image, known from the image's size alone."""

    num_crops: int
    num_image_tokens: int


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
