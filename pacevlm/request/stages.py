"""One request at batch 1, stage by stage, from the source given to the answer; its clock marks stages as they pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from pacevlm.checks import whole_number
from pacevlm.errors import KnobError
from pacevlm.images import ImageSource, open_picture
from pacevlm.knobs import Compute, Knobs
from pacevlm.models.decoder import Generation
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.clock import StageClock
from pacevlm.types import Answer


class Request:
    """A request that has been read and looked at; see `open_request`.

    Args:
        clock: has just started.

    Attributes:
        view: what may be known of it before its pixels are encoded.
    """

    def __init__(
        self,
        model: ElasticModel,
        image: ImageSource | None,
        question: str,
        clock: StageClock,
        max_new_tokens: int | None = None,
        num_output_tokens: int | None = None,
    ) -> None:
        limit = model.max_new_tokens if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens)
        if num_output_tokens is not None:
            limit = whole_number("num_output_tokens", num_output_tokens)
        self.model, self.max_new_tokens, self.min_new_tokens = model, limit, num_output_tokens or 0
        self._clock = clock
        self._pixels: Image.Image | None = None
        picture = None if image is None else open_picture(image, model.picture_config)
        if picture is not None:
            # Refuses what the model cannot take before anything is decoded.
            model.vision_sizes(picture.height, picture.width)
            self._pixels = picture.decode()
            picture = dataclasses.replace(picture, source=self._pixels)
        self._clock.mark("read_ms")
        self._prompt = model.adapter.encode_question(question, picture is not None)
        self._clock.mark("prepare_ms")
        self.view = model.look(picture, self._prompt, limit)

    def encode(self, tier: str, latency_token: Tensor | None = None) -> Tensor | None:
        """Encode the picture at a tier and run the first blocks.

        Args:
            latency_token: the encoded objective, `(d_model,)`.

        Returns:
            the latency token behind the first blocks, `(d_model,)`; None if there is none.

        Raises:
            KnobError: the tier is not in the knob space.
        """
        model, adapter = self.model, self.model.adapter
        if tier not in model.vision_budgets:
            raise KnobError(f"tier {tier!r} was chosen, but this model has {tuple(model.vision_budgets)}")
        self._clock.mark("stage1_ms")
        self.tier = tier
        prepared = adapter.prepare(self._pixels, self._prompt, model.vision_budgets[tier])
        self._clock.mark("prepare_ms")
        features = None if self._pixels is None else adapter.encode_vision([prepared])[0]
        self._clock.mark("vision_ms")
        self._prefix = model.decoder.prefix([adapter.embed(prepared, features)])[0]
        if latency_token is None:
            return None
        return model.decoder.latency_token([self._prefix], [latency_token[None].to(self._prefix.hidden)])[0]

    def finish(self, compute: Compute, on_token: Callable[[int], None] | None = None) -> Answer:
        """Run the other blocks and decode; raises KnobError if the knobs are not in the knob space.

        Args:
            on_token: told every token as it is generated; what it takes is part of the request's time.
        """
        model, knobs = self.model, Knobs(self.tier, *compute)
        model.knob_space.index(knobs)
        self._clock.mark("first_block_ms")
        # Kept until the request ends, so that whoever is told the answer does not wait for its caches to be freed.
        self._generation = generation = Generation(
            model.decoder,
            [self._prefix],
            [knobs.top_k],
            [knobs.num_blocks],
            self.max_new_tokens,
            self.min_new_tokens,
        )
        token_ids = generation.generated[0]
        generation.step()
        self._clock.mark("prefill_ms")
        if on_token is not None:
            on_token(token_ids[-1])
        while generation.alive:
            generation.step()
            self._clock.mark("decode_ms")
            if on_token is not None:
                on_token(token_ids[-1])
        return Answer(
            answer=model.adapter.decode(token_ids),
            token_ids=tuple(token_ids),
            knobs=knobs,
            sizes=self.view.sizes,
            vision=self.view.sizes.vision[model.knob_space.tiers.index(knobs.tier)],
            times=self._clock.finish(),
        )


@contextmanager
def open_request(
    model: ElasticModel,
    image: ImageSource | None,
    question: str,
    *,
    max_new_tokens: int | None = None,
    num_output_tokens: int | None = None,
) -> Iterator[Request]:
    """Read and look at one request, and keep torch from recording gradients until it is over; its clock starts here.

    Args:
        image: path, bytes, PIL image or array; None for a question alone.
        question: the user's text.
        max_new_tokens: most generated tokens, end-of-text included; the model's own limit if None.
        num_output_tokens: generate exactly so many, for measurements; end-of-text then ends nothing, and
            `max_new_tokens` does not count.

    Raises:
        ImageError, QuestionError: the input cannot be used.
        ConfigError: `max_new_tokens` or `num_output_tokens` is not a whole number of at least 1.
    """
    clock = StageClock(model.device)
    with torch.inference_mode():
        yield Request(model, image, question, clock, max_new_tokens, num_output_tokens)
