"""The interface between one family of vision-language models and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pacevlm.errors import ImageError
from pacevlm.types import VisionSizes

# Tables of rotary positions, whose first dimension counts rows, or is 1 where all rows have the same.
Rope = tuple[Tensor, ...]


class Prompt(Protocol):
    """A tokenised question: what a request has besides its image."""

    @property
    def text_ids(self) -> Sequence[int]:
        """Tokens of the question and of the words around it, at least one."""

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens, special ones included."""


class Prepared(Protocol):
    """Model inputs of one request at one tier."""

    @property
    def input_ids(self) -> Tensor:
        """`(tokens,)`."""

    @property
    def vision_sizes(self) -> VisionSizes:
        """What the picture became."""


@dataclass(frozen=True)
class EmbeddedPrompt:
    """What the blocks read of one prompt.

    Attributes:
        hidden: the stream in front of the first block, `(tokens, d_model)`.
        positions: of every token, `(tokens, axes)`; None where they are 0, 1, 2 and so on.
        next_position: of the first generated token, on every axis; None where it is the number of tokens.
        added: by the number of a block in the checkpoint, what is added to the stream behind it, `(tokens, d_model)`,
            whether that block runs or not.
        seen_both_ways: first token and one behind the last of a span whose tokens see each other, later ones too, in
            the blocks that have a window; never the prompt's last token.
    """

    hidden: Tensor
    positions: Tensor | None = None
    next_position: int | None = None
    added: Mapping[int, Tensor] = field(default_factory=dict)
    seen_both_ways: tuple[int, int] | None = None


class RowDecode(Protocol):
    """Steps of a single row, one token each, apart from the loop over blocks; for prompts without positions."""

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


class Adapter(ABC, Generic[PromptT, PreparedT]):
    """What pacevlm needs from a model family; one class per family derives from it.

    The loop over blocks is not the model's: `project`, `attend` and `mix_experts` are the three steps of one block,
    so that the caller owns caches, masks and the choice of blocks. How a smaller top_k is applied (kept weights
    renormalised or not, shared experts, groups, biases) is the family's, and so is all of attention but the mask.

    What does not fit yet: caches that layers share, and blocks with a state instead of keys and values.

    A tier is a *vision budget* to the family: a whole number in a unit of its own, such as crops, patches or pixels.

    Attributes:
        num_blocks: decoder blocks of the checkpoint.
        num_experts: experts per block; 1 for a dense model.
        trained_top_k: experts per token that the checkpoint was trained with; 1 for a dense model.
        d_model: width of the residual stream.
        max_positions: most tokens of prompt and answer that requests may use; buffers and profiles grow with it, so a
            family with a long window says less.
        end_token_ids: ids that end an answer.
        cache_bytes_per_token: bytes of one token's keys and values in one block.
        device, dtype: where the weights are, and their type.
        default_vision_budgets: what tiers mean where nobody says otherwise, cheapest first.
        fixed_blocks: blocks that no configuration leaves out, besides those in front of stage 2.
        windows: by block, how many tokens back a token sees there, itself included; all of them in other blocks.
        position_axes: axes of the rotary positions that prompts are given; 0 where positions count 0, 1, 2 and so on.
        compiler: what compiles what runs between matrix products, `numba` or `triton`; latencies with and without do
            not compare.
        max_graph_tokens: longest prompt whose blocks a CUDA graph may hold; 0 where they ask the device for something.
    """

    num_blocks: int
    num_experts: int
    trained_top_k: int
    d_model: int
    max_positions: int
    end_token_ids: frozenset[int]
    cache_bytes_per_token: int
    device: torch.device
    dtype: torch.dtype
    default_vision_budgets: Mapping[str, int]
    fixed_blocks: frozenset[int] = frozenset()
    windows: Mapping[int, int] = MappingProxyType({})
    position_axes: int = 0
    compiler: str | None = None
    max_graph_tokens: int = 0

    # Text and pictures ------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_question(self, question: str, has_image: bool = True) -> PromptT:
        """Check and tokenise a question, about an image or alone; raises QuestionError."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, surrounding white space removed."""

    @abstractmethod
    def vision_sizes(self, height: int, width: int, vision_budget: int) -> VisionSizes:
        """What an image becomes, from its size in pixels alone; raises ImageError for one that cannot be taken.

        No number falls as the budget grows.
        """

    def max_image_tokens(self, vision_budget: int) -> int:
        """Most image tokens of any picture, found by trying large ones of many shapes."""
        found = [0]
        for short in (16384 >> i for i in range(8)):
            for height, width in ((short, 16384), (16384, short)):
                with suppress(ImageError):
                    found.append(self.vision_sizes(height, width, vision_budget).num_image_tokens)
        return max(found)

    @abstractmethod
    def prepare(self, image: Image.Image | None, prompt: PromptT, vision_budget: int) -> PreparedT:
        """Cut an RGB image, if there is one, for a tier and lay out the prompt; raises ImageError."""

    @abstractmethod
    def encode_vision(self, requests: Sequence[PreparedT]) -> list[Any]:
        """Features of every request's image, one batch for all, in whatever form `embed` reads; all have one."""

    # The decoder ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, request: PreparedT, features: Any) -> EmbeddedPrompt:
        """What the blocks read of a request; `features` is None where it has no image."""

    @abstractmethod
    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embeddings of text tokens as the first block reads them, scaled where the family scales them.

        Args:
            token_ids: `(rows,)`.

        Returns:
            `(rows, d_model)`.
        """

    @abstractmethod
    def rope(self, positions: Tensor) -> Rope:
        """Rotary tables, shared by all blocks.

        Args:
            positions: `(rows, tokens)`, or `(rows, tokens, axes)` for a family that gives prompts positions.
        """

    @abstractmethod
    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, each `(rows, heads, tokens, head_dim)`; fewer heads for the latter."""

    @abstractmethod
    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attention output for the residual stream, `(rows, tokens, d_model)`.

        Args:
            mask: True where a query may look, or what is added to its scores, `(rows, 1, queries, keys)`; None where
                everything, or `is_causal`, says.
        """

    @abstractmethod
    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """Experts' output for the residual stream, `(rows, tokens, d_model)`; `top_k` is one number or one per row."""

    def project_into(self, block: int, x: Tensor, rope: Rope, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        """`project` into a cache: queries, while keys and values are written to it.

        Args:
            keys, values: `(rows, heads, capacity, head_dim)`.
            places: where the tokens stand in them, one behind the other, `(tokens,)`.
        """
        q, k, v = self.project(block, x, rope)
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return q

    def add_attention(
        self, block: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The residual stream with `attend` added to it."""
        return x + self.attend(block, q, k, v, mask, is_causal)

    def add_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """The residual stream with `mix_experts` added to it."""
        return x + self.mix_experts(block, x, top_k)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output head: `(rows, d_model)` to `(rows, vocabulary)`."""

    def row_decode(self, num_tokens: int) -> RowDecode | None:
        """Steps of a row of at most so many tokens that are quicker than the loop's; None if there are none."""
        return None
