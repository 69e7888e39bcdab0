"""MolmoE's processor: an image and a question become the tensors of one request, and requests become a batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from pacevlm.errors import CheckpointError, ConfigError, QuestionError
from pacevlm.images import ImageSource
from pacevlm.models.molmoe.image_processing import (
    MolmoEImageProcessor,
    PreparedImage,
    check_tensor_call,
    pad_stack,
)
from pacevlm.models.molmoe.tiling import check_max_crops, most_image_tokens
from pacevlm.models.molmoe.tokenization import (
    EOS_TOKEN,
    IM_COL_TOKEN,
    IM_END_TOKEN,
    IM_PATCH_TOKEN,
    IM_START_TOKEN,
    IMAGE_TOKEN,
)
from pacevlm.types import VisionSizes

PROMPT_PREFIX = " User: "
PROMPT_SUFFIX = " Assistant:"

MAX_CHARS_PER_TOKEN = 16
"""A question with more characters than this per allowed token is refused before it is tokenized."""


@dataclass(frozen=True, slots=True)
class SpecialTokenIds:
    """Ids of the tokens that the processor places itself."""

    bos: int
    im_start: int
    im_end: int
    im_patch: int
    im_col: int

    def image_token_ids(self, token_pattern: torch.Tensor) -> torch.Tensor:
        """Ids of the image tokens of a pattern of kinds, same shape."""
        return _kinds(self)[token_pattern]


@functools.lru_cache(maxsize=16)
def _kinds(special: SpecialTokenIds) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor([special.im_start, special.im_end, special.im_patch, special.im_col])


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """The model's inputs for one request, without a batch dimension.

    Attributes:
        input_ids: `(tokens,)` int64: BOS, image tokens where the image stands, and the prompt.
        images: `(crops, patches, patch_values)` float32, or None for text alone.
        image_masks: `(crops, patches)` float32, or None.
        image_input_idx: `(crops, cells)` int64, sequence position of each cell, negative where unused, or None.
        num_text_tokens: tokens that are not image tokens, BOS included.
        vision_sizes: crops and image tokens; zeros for text alone.
    """

    input_ids: torch.Tensor
    images: torch.Tensor | None
    image_masks: torch.Tensor | None
    image_input_idx: torch.Tensor | None
    num_text_tokens: int
    vision_sizes: VisionSizes


def assemble_request(
    ids_before: Sequence[int], ids_behind: Sequence[int], image: PreparedImage | None, special: SpecialTokenIds
) -> PreparedRequest:
    """Join BOS, prompt and image tokens: `BOS + ids_before + image tokens + ids_behind`."""
    num_text_tokens = 1 + len(ids_before) + len(ids_behind)
    if image is None:
        input_ids = torch.tensor([special.bos, *ids_before, *ids_behind], dtype=torch.int64)
        return PreparedRequest(input_ids, None, None, None, num_text_tokens, VisionSizes(0, 0))
    input_ids = torch.cat(
        [
            torch.tensor([special.bos, *ids_before], dtype=torch.int64),
            special.image_token_ids(image.token_pattern),
            torch.tensor(ids_behind, dtype=torch.int64),
        ]
    )
    positions = image.image_input_idx
    if ids_before:
        positions = torch.where(positions >= 0, positions + len(ids_before), positions)
    return PreparedRequest(input_ids, image.images, image.image_masks, positions, num_text_tokens, image.vision_sizes)


def collate_requests(requests: Sequence[PreparedRequest]) -> dict[str, torch.Tensor]:
    """Batch requests, each tensor padded behind with -1.

    Returns:
        `input_ids` and `attention_mask` `(batch, tokens)` int64 and, unless every request is text alone, `images`
        `(batch, crops, patches, patch_values)`, `image_masks` `(batch, crops, patches)` and `image_input_idx`
        `(batch, crops, cells)`. A request without an image has only padding crops.

    Raises:
        ConfigError: there is no request, or the requests come from different crop geometries.
    """
    if not requests:
        raise ConfigError("there is no request to batch; give at least one")
    input_ids = pad_stack([request.input_ids for request in requests])
    batch = {"input_ids": input_ids, "attention_mask": (input_ids >= 0).long()}
    for name in ("images", "image_masks", "image_input_idx"):
        tensors = [getattr(request, name) for request in requests]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            continue
        if len({tensor.shape[1:] for tensor in present}) > 1:
            raise ConfigError("requests that were prepared with different crop geometries cannot be batched")
        none = present[0][:0]
        batch[name] = pad_stack([none if tensor is None else tensor for tensor in tensors])
    return batch


class MolmoEProcessor(ProcessorMixin):
    """Image processor and tokenizer of MolmoE together, with MolmoE's prompt.

    A prompt is `" User: " + question + " Assistant:"` behind the end-of-text token that serves as BOS; the image
    stands in front of it, or where the question says `<|image|>`. Strings of other special tokens in a question are
    ordinary text.

    Args:
        image_processor: prepares the image.
        tokenizer: a fast tokenizer that knows the special tokens.
        max_length: most tokens of a prompt, image included. It bounds the question for the largest image, so that
            one question is accepted or refused whatever its image and tier.

    Raises:
        ConfigError: the tokenizer lacks a special token, or `max_length` leaves no room for a question.
    """

    def __init__(
        self,
        image_processor: MolmoEImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 4096,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call,unused-ignore]
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ConfigError(f"max_length is {max_length!r}; it must be a whole number of tokens of at least 1")
        self.max_length = max_length
        bos, im_start, im_end, im_patch, im_col, _ = (
            self._token_id(token)
            for token in (EOS_TOKEN, IM_START_TOKEN, IM_END_TOKEN, IM_PATCH_TOKEN, IM_COL_TOKEN, IMAGE_TOKEN)
        )
        self.special_token_ids = SpecialTokenIds(bos, im_start, im_end, im_patch, im_col)
        self._num_wrapper_tokens = len(self._encode(PROMPT_PREFIX)) + len(self._encode(PROMPT_SUFFIX))
        self.max_question_tokens()  # refuses a length that no question fits

    def _token_id(self, token: str) -> int:
        token_id: object = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(token_id, int) or self.tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ConfigError(f"the tokenizer does not know the special token {token}; use a MolmoE tokenizer")
        return token_id

    def _encode(self, text: str) -> list[int]:
        # Special tokens are split, so that a question cannot bring image tokens of its own.
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def max_question_tokens(self, max_crops: int | None = None) -> int:
        """Most tokens that a question may have, whatever its image.

        The largest image of at least the image processor's `max_crops` counts, so that a tier cannot change what is
        accepted.

        Raises:
            ConfigError: `max_length` leaves no room for a question.
        """
        most_crops = max(self.image_processor.max_crops, max_crops or 0)
        num_image_tokens = most_image_tokens(self.image_processor.geometry, most_crops)
        num_left = self.max_length - 1 - self._num_wrapper_tokens - num_image_tokens
        if num_left < 1:
            raise ConfigError(
                f"max_length {self.max_length} leaves no room for a question beside the up to {num_image_tokens} image "
                f"tokens of {most_crops} crops; raise it or lower max_crops"
            )
        return num_left

    def _check_question(self, question: object, has_image: bool, max_question_tokens: int) -> list[str]:
        """The question's text before and behind the image, as one or two pieces."""
        if not isinstance(question, str):
            raise QuestionError(f"a question must be text, not {type(question).__name__}")
        if len(question) > MAX_CHARS_PER_TOKEN * max_question_tokens:
            raise QuestionError(
                f"the question has {len(question):,} characters, far more than fit into the {max_question_tokens:,} "
                "tokens that it may have; shorten it"
            )
        pieces = question.split(IMAGE_TOKEN)
        if len(pieces) > 2:
            raise QuestionError(
                f"the question holds {IMAGE_TOKEN} {len(pieces) - 1} times, but there is one image per question; "
                "keep one of them"
            )
        if len(pieces) == 2 and not has_image:
            raise QuestionError(f"the question holds {IMAGE_TOKEN}, but no image was given; give one or remove it")
        if not any(piece.strip() for piece in pieces):
            raise QuestionError("the question is empty; ask something, for example 'Describe this image.'")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise QuestionError(f"the question is not valid Unicode text: {error}") from error
        return pieces

    def prepare(self, image: ImageSource | None, question: str, max_crops: int | None = None) -> PreparedRequest:
        """Prepare one request.

        Args:
            image: what `load_image` accepts, or None for a question about no image.
            question: the user's text; `<|image|>` in it marks the image's place.
            max_crops: most high-resolution crops; the image processor's by default.

        Raises:
            QuestionError: the question is empty, too long, not text, or its image mark does not fit the image.
            ImageError: the image cannot be read or is too elongated.
            ConfigError: `max_crops` is below 1 or not a whole number.
        """
        ids_before, ids_behind = self.encode_question(question, image is not None, max_crops)
        prepared = None if image is None else self.image_processor.prepare(image, max_crops)
        return assemble_request(ids_before, ids_behind, prepared, self.special_token_ids)

    def encode_question(
        self, question: str, has_image: bool = True, max_crops: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before and behind the image, BOS not included; raises as `prepare` does."""
        if max_crops is not None:
            check_max_crops(max_crops)
        limit = self.max_question_tokens(max_crops)
        pieces = self._check_question(question, has_image, limit)
        if len(pieces) == 2:
            ids_before, ids_behind = (
                self._encode(text) for text in (PROMPT_PREFIX + pieces[0], pieces[1] + PROMPT_SUFFIX)
            )
        else:
            ids_before, ids_behind = [], self._encode(PROMPT_PREFIX + pieces[0] + PROMPT_SUFFIX)
        num_question_tokens = len(ids_before) + len(ids_behind) - self._num_wrapper_tokens
        if num_question_tokens > limit:
            raise QuestionError(
                f"the question has {num_question_tokens:,} tokens, but at most {limit:,} fit beside the largest image; "
                "shorten it"
            )
        return ids_before, ids_behind

    def collate(self, requests: Sequence[PreparedRequest]) -> BatchFeature:
        """Batch prepared requests; see `collate_requests`."""
        return BatchFeature(collate_requests(requests))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        max_crops: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one question or several, each with at most one image.

        Args:
            images: nothing, one image, or a list with one image (or None) for each question.
            text: one question or a list of them.
            max_crops: most high-resolution crops; the image processor's by default.

        Returns:
            The batch that `collate_requests` describes.

        Raises:
            QuestionError: a question is missing, unfit, or has several images.
            ImageError: an image cannot be read.
            ConfigError: an unknown setting, or `return_tensors` other than "pt".
        """
        check_tensor_call(return_tensors, kwargs)
        questions: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if images is None:
            images = [None] * len(questions)
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if not questions or len(images) != len(questions):
            raise QuestionError(
                f"{len(questions)} questions and {len(images)} images were given; give one image for each question, "
                "several images for one question are not supported"
            )
        requests = []
        for image, question in zip(images, questions, strict=True):
            if isinstance(image, (list, tuple)):
                if len(image) > 1:
                    raise QuestionError(f"{len(image)} images were given for one question; give at most one")
                image = image[0] if image else None
            requests.append(self.prepare(image, question, max_crops))
        return self.collate(requests)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> MolmoEProcessor:
        """Load image processor, tokenizer and settings from a directory or a repository; runs no code from there.

        `max_length` and `chat_template` replace what was saved; the other arguments are those of transformers.

        Raises:
            CheckpointError: a file is missing or malformed.
            ConfigError: the files hold unusable settings.
        """
        source: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": kwargs.get("subfolder", ""),
        }
        try:
            settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **source)
            image_processor = MolmoEImageProcessor.from_pretrained(pretrained_model_name_or_path, **source)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **source)
        except ConfigError:
            raise
        except Exception as error:
            # A malformed tokenizer file raises a bare Exception, the other files OSError or ValueError.
            raise CheckpointError(
                f"{os.fspath(pretrained_model_name_or_path)!r} holds no usable MolmoE processor; it must be a "
                f"directory written by save_pretrained: {error}"
            ) from error
        options = {name: kwargs.get(name, settings.get(name)) for name in ("max_length", "chat_template")}
        return cls(image_processor, tokenizer, **{name: value for name, value in options.items() if value is not None})
