"""The interface between one family of multimodal mixture-of-experts models and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pacevlm.types import VisionSizes

Rope = tuple[Tensor, Tensor]


class Prompt(Protocol):
    """A tokenised question: what a request has besides its image."""

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens, BOS included."""


class Prepared(Protocol):
    """Model inputs of one request at one tier."""

    @property
    def input_ids(self) -> Tensor:
        """`(tokens,)`."""

    @property
    def vision_sizes(self) -> VisionSizes:
        """Crops and image tokens."""

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens, BOS included."""


class RowDecode(Protocol):
    """Steps of a single row, one token each, apart from the loop over blocks."""

    def load(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Take over the prompt's keys and values of a block, each `(1, heads, tokens, head_dim)`."""

    def run(self, x: Tensor, position: int, top_k_of: Mapping[int, int]) -> Tensor:
        """Run blocks on one new token, `(1, d_model)` to the same shape.

        Args:
            x: the residual stream before the blocks.
            position: place of the token, counted from 0.
            top_k_of: experts per token of every block that runs, in order; each has been loaded.
        """


PromptT = TypeVar("PromptT", bound=Prompt)
PreparedT = TypeVar("PreparedT", bound=Prepared)


class Adapter(Protocol[PromptT, PreparedT]):
    """What pacevlm needs from a model family; one small class per family implements it.

    The loop over blocks is not the model's: `project`, `attend` and `mix_experts` are the three steps of one block,
    so that the caller owns caches, masks and the choice of blocks.
    """

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the checkpoint."""

    @property
    def num_experts(self) -> int:
        """Experts per block."""

    @property
    def trained_top_k(self) -> int:
        """Experts per token that the checkpoint was trained with."""

    @property
    def renormalises_top_k(self) -> bool:
        """Whether the kept router weights are scaled to sum to one."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""

    @property
    def eos_token_id(self) -> int:
        """Id that ends an answer."""

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def encode_question(self, question: str) -> PromptT:
        """Check and tokenise a question."""

    def question_embedding(self, prompt: PromptT) -> Tensor:
        """Mean of the prompt's token embeddings, `(d_model,)`, float32, on the CPU, where policies read it."""

    def vision_sizes(self, height: int, width: int, max_crops: int) -> VisionSizes:
        """Crops and image tokens of an image, from its size in pixels alone."""

    def prepare(self, image: Image.Image, prompt: PromptT, max_crops: int) -> PreparedT:
        """Cut an RGB image for a tier and lay out the prompt."""

    def encode_vision(self, requests: Sequence[PreparedT]) -> list[Tensor]:
        """Image features of every request, one batch for all crops; each `(crops, cells, d_model)`."""

    def embed(self, request: PreparedT, features: Tensor) -> Tensor:
        """Input of the first block, `(tokens, d_model)`."""

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embeddings of generated tokens, `(rows,)` to `(rows, d_model)`."""

    def rope(self, position_ids: Tensor) -> Rope:
        """Rotary tables of positions `(rows, tokens)`, shared by all blocks."""

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, each `(rows, heads, tokens, head_dim)`."""

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attention output for the residual stream, `(rows, tokens, d_model)`."""

    def project_out(self, block: int, mixed: Tensor) -> Tensor:
        """Output projection of heads that are mixed already, `(rows, heads, tokens, head_dim)` to the stream."""

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """Experts' output for the residual stream; `top_k` is one number or one per row."""

    def row_decode(self, num_tokens: int) -> RowDecode | None:
        """Steps of a row of at most so many tokens that are quicker than the loop's; None if there are none."""

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output head: `(rows, d_model)` to `(rows, vocabulary)`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, surrounding white space removed."""
