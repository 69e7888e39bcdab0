"""Qwen3-VL (Qwen team 2025) behind the adapter interface, on the modules and weights of transformers' dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from pacevlm.errors import ImageError
from pacevlm.models.adapter import Adapter, EmbeddedPrompt, Rope
from pacevlm.models.pretrained import end_tokens
from pacevlm.models.questions import SplitPrompt, encode_question, encode_text
from pacevlm.types import VisionSizes

# What the chat template makes of one user's turn, with a picture or without; only these name special tokens.
BEFORE_TEXT = "<|im_start|>user\n"
BEFORE_IMAGE = BEFORE_TEXT + "<|vision_start|>"
IMAGE_TOKEN = "<|image_pad|>"
BEHIND_IMAGE = "<|vision_end|>"
BEHIND_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"

# Image tokens of the tiers that a checkpoint says nothing about.
DEFAULT_IMAGE_TOKENS = {"low": 64, "medium": 256, "high": 1024}
# The image processor takes no picture that is longer.
MAX_ASPECT = 200
# Checkpoints take 262,144 positions. Buffers of graph decoding and the longest questions of a profile grow with them.
MAX_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class Qwen3VLRequest:
    """The model's inputs for one request.

    Attributes:
        input_ids: `(tokens,)`.
        is_image: which of them are image tokens, `(tokens,)`.
        patches: pixel values in the order of the vision encoder, `(patches, patch_values)`; None without an image.
        grid: frames, rows and columns of patches, `(1, 3)`; None without an image.
        vision_sizes: patches, image tokens and pairs of patches.
    """

    input_ids: Tensor
    is_image: Tensor
    patches: Tensor | None
    grid: Tensor | None
    vision_sizes: VisionSizes


class Qwen3VLAdapter(Adapter[SplitPrompt, Qwen3VLRequest]):
    """Adapter of a dense Qwen3-VL model; see `pacevlm.models.adapter.Adapter` for the methods.

    A tier's vision budget is the most pixels that a picture is resized to. A token's positions are its time, row and
    column.
    """

    position_axes = 3

    def __init__(
        self, model: Qwen3VLForConditionalGeneration | Any, tokenizer: PreTrainedTokenizerBase, image_processor: Any
    ) -> None:
        model.train(False)
        self.model = model.requires_grad_(False)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.text, self.layers = model.model.language_model, list(model.model.language_model.layers)
        config: Any = model.config.text_config
        self.num_blocks = len(self.layers)
        # A dense model's.
        self.num_experts, self.trained_top_k = 1, 1
        self.d_model: int = config.hidden_size
        self.max_positions: int = min(config.max_position_embeddings, MAX_POSITIONS)
        self.end_token_ids = end_tokens(model, config)
        self.head_dim: int = config.head_dim
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.cache_bytes_per_token = 2 * config.num_key_value_heads * self.head_dim * self.dtype.itemsize
        # Sides of a picture are multiples of this, pixels; one image token covers its square.
        self.token_side: int = image_processor.patch_size * image_processor.merge_size
        self.default_vision_budgets = {tier: count * self.token_side**2 for tier, count in DEFAULT_IMAGE_TOKENS.items()}
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_id: int = cast(int, image_id)
        self._before, self._before_text = encode_text(tokenizer, BEFORE_IMAGE), encode_text(tokenizer, BEFORE_TEXT)
        self._between, self._behind = encode_text(tokenizer, BEHIND_IMAGE), encode_text(tokenizer, BEHIND_QUESTION)

    # Text and pictures ------------------------------------------------------------------------------------------------

    def encode_question(self, question: str, has_image: bool = True) -> SplitPrompt:
        """See `Adapter`; raises QuestionError."""
        before, between = (self._before, self._between) if has_image else (self._before_text, [])
        return encode_question(self.tokenizer, question, self.max_positions, before, between, self._behind)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Adapter`."""
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _pixel_limits(self, height: int, width: int, vision_budget: int) -> tuple[int, int]:
        """Fewest and most pixels of a resized picture, as the image processor is given them."""
        least, most, side = self.image_processor.size["shortest_edge"], vision_budget, self.token_side
        if round(height / side) * round(width / side) * side**2 > vision_budget:
            # The processor shrinks it then, but would enlarge a long one that only rounding made too large, so that a
            # dearer tier could have fewer tokens.
            most = min(vision_budget, height * width)
        return min(least, most), most

    def vision_sizes(self, height: int, width: int, vision_budget: int) -> VisionSizes:
        """See `Adapter`; raises ImageError."""
        least, most = self._pixel_limits(height, width, vision_budget)
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ImageError(
                f"the image is {width}x{height} pixels, more than {MAX_ASPECT} times as long as wide; crop it"
            )
        count = self.image_processor.get_number_of_image_patches(
            height, width, {"min_pixels": least, "max_pixels": most}
        )
        return VisionSizes(count, count // self.image_processor.merge_size**2, count * count)

    def max_image_tokens(self, vision_budget: int) -> int:
        """See `Adapter`: a side is one token at least, so that long pictures may have more than the budget."""
        longest = -(-math.isqrt(MAX_ASPECT * vision_budget) // self.token_side) + 1
        return max(vision_budget // self.token_side**2, longest)

    def prepare(self, image: Image.Image | None, prompt: SplitPrompt, vision_budget: int) -> Qwen3VLRequest:
        """See `Adapter`; raises ImageError."""
        if image is None:
            ids = torch.tensor(prompt.text_ids)
            return Qwen3VLRequest(ids, torch.zeros_like(ids, dtype=torch.bool), None, None, VisionSizes(0, 0))
        sizes = self.vision_sizes(image.height, image.width, vision_budget)
        least, most = self._pixel_limits(image.height, image.width, vision_budget)
        inputs = self.image_processor(
            images=image, size={"shortest_edge": least, "longest_edge": most}, return_tensors="pt"
        )
        count = sizes.num_image_tokens
        ids = torch.tensor([*prompt.ids_before, *[self.image_id] * count, *prompt.ids_behind])
        is_image = torch.zeros_like(ids)
        is_image[len(prompt.ids_before) : len(prompt.ids_before) + count] = 1
        return Qwen3VLRequest(ids, is_image.bool(), inputs["pixel_values"], inputs["image_grid_thw"], sizes)

    def encode_vision(self, requests: Sequence[Qwen3VLRequest]) -> list[list[Tensor]]:
        """See `Adapter`; for every request what stands in front of the first block and what is added behind some."""
        patches = torch.cat([cast(Tensor, request.patches) for request in requests]).to(self.device)
        grids = torch.cat([cast(Tensor, request.grid) for request in requests]).to(self.device)
        # `get_image_features` cuts these apart from release to release in other ways.
        found: Any = self.model.model.visual(patches.to(self.dtype), grid_thw=grids, return_dict=True)
        counts = [request.vision_sizes.num_image_tokens for request in requests]
        depths = [found.pooler_output, *found.deepstack_features]
        return [list(of_one) for of_one in zip(*(depth.split(counts) for depth in depths), strict=True)]

    # The decoder ------------------------------------------------------------------------------------------------------

    def embed(self, request: Qwen3VLRequest, features: list[Tensor] | None) -> EmbeddedPrompt:
        """See `Adapter`."""
        ids, is_image = request.input_ids, request.is_image
        if features is None:
            counted = torch.arange(len(ids), device=self.device)[:, None].expand(-1, self.position_axes)
            return EmbeddedPrompt(self.embed_tokens(ids.to(self.device)), counted, len(ids))
        positions, offset = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=is_image[None].int(), image_grid_thw=request.grid
        )
        places = is_image.nonzero()[:, 0].to(self.device)
        hidden = self.embed_tokens(ids.to(self.device)).index_copy(0, places, features[0])
        nothing = torch.zeros_like(hidden)
        return EmbeddedPrompt(
            hidden,
            positions[:, 0].T.to(self.device),
            len(ids) + int(offset),
            {block: nothing.index_copy(0, places, added) for block, added in enumerate(features[1:])},
        )

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """See `Adapter`."""
        return F.embedding(token_ids, self.text.embed_tokens.weight)

    def rope(self, positions: Tensor) -> Rope:
        """See `Adapter`."""
        cos, sin = self.text.rotary_emb(self.text.embed_tokens.weight, positions.movedim(-1, 0))
        return cos[:, None], sin[:, None]

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        layer = self.layers[block]
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q = attention.q_norm(attention.q_proj(normed).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = attention.v_proj(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return _rotate(q, rope), _rotate(k, rope), v

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `Adapter`."""
        attention = self.layers[block].self_attn
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=attention.scaling, enable_gqa=True
        )
        out: Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`; a dense model has nothing to choose."""
        layer = self.layers[block]
        dense: Tensor = layer.mlp(layer.post_attention_layernorm(x))
        return dense

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.model.lm_head(self.text.norm(x))
        return out


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]
