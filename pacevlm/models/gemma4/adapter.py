"""Gemma 4 (Google DeepMind 2026) behind the adapter interface, on the modules and weights of transformers' model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from pacevlm.errors import ConfigError, ImageError
from pacevlm.models.adapter import Adapter, EmbeddedPrompt, Rope
from pacevlm.models.experts import run_experts, spread_top_k
from pacevlm.models.pretrained import end_tokens
from pacevlm.models.questions import SplitPrompt, encode_question, encode_text
from pacevlm.types import VisionSizes

# What Google's page on prompts makes of one user's turn, thinking off; only these name special tokens.
BEFORE_TEXT = "<bos><|turn>user\n"
BEFORE_IMAGE = BEFORE_TEXT + "<|image>"
IMAGE_TOKEN = "<|image|>"
BEHIND_IMAGE = "<image|>"
BEHIND_QUESTION = "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
SPECIAL_TOKENS = ("<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|channel>", "<channel|>", IMAGE_TOKEN)

# The only soft tokens that the image processor takes.
SOFT_TOKENS = MappingProxyType({"lowest": 70, "low": 140, "medium": 280, "high": 560, "highest": 1120})
# Checkpoints take 262,144 positions. Buffers of graph decoding and the longest questions of a profile grow with them.
MAX_POSITIONS = 8192
SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Gemma4Request:
    """The model's inputs for one request.

    Attributes:
        input_ids: `(tokens,)`.
        span: first image token and one behind the last; None without an image.
        patches: pixel values of the patches, `(patches, patch_values)`, without padding; None without an image.
        places: column and row of every patch, `(patches, 2)`; None without an image.
        vision_sizes: patches, image tokens and pairs of patches.
    """

    input_ids: Tensor
    span: tuple[int, int] | None
    patches: Tensor | None
    places: Tensor | None
    vision_sizes: VisionSizes


class Gemma4Adapter(Adapter[SplitPrompt, Gemma4Request]):
    """Adapter of a Gemma 4 model; see `pacevlm.models.adapter.Adapter` for the methods.

    A tier's vision budget is the most soft tokens that a picture may have, one of 70, 140, 280, 560 and 1120.
    """

    default_vision_budgets = SOFT_TOKENS

    def __init__(
        self, model: Gemma4ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image_processor: Any
    ) -> None:
        model.train(False)
        self.model = model.requires_grad_(False)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.text, self.layers = model.model.language_model, list(model.model.language_model.layers)
        config: Any = model.config.text_config
        self.num_blocks = len(self.layers)
        self.num_experts: int = config.num_experts if config.enable_moe_block else 1
        self.trained_top_k: int = config.top_k_experts if config.enable_moe_block else 1
        self.d_model: int = config.hidden_size
        self.eps: float = config.rms_norm_eps
        self.soft_cap: float | None = config.final_logit_softcapping
        self.max_positions: int = min(config.max_position_embeddings, MAX_POSITIONS)
        self.end_token_ids = end_tokens(model, config)
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        widths = [layer.self_attn.k_proj.out_features for layer in self.layers]
        # Full and sliding blocks keep heads of different sizes: the mean, rounded up.
        self.cache_bytes_per_token = -(-2 * sum(widths) // len(widths)) * self.dtype.itemsize
        self.windows = {
            block: config.sliding_window for block, kind in enumerate(config.layer_types) if kind == SLIDING
        }
        self.sees_pictures_both_ways = config.use_bidirectional_attention == "vision"
        self.layer_types = list(dict.fromkeys(config.layer_types))
        # Where the tables of a block stand in `rope`.
        self.table = [2 * self.layer_types.index(kind) for kind in config.layer_types]
        self.image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self._before, self._before_text = encode_text(tokenizer, BEFORE_IMAGE), encode_text(tokenizer, BEFORE_TEXT)
        self._between, self._behind = encode_text(tokenizer, BEHIND_IMAGE), encode_text(tokenizer, BEHIND_QUESTION)
        if self.device.type != "meta":
            self._fold()

    def _fold(self) -> None:
        """Products of constants that every token would compute anew: the router's scales, and the whole layer's."""
        self.embed_scale = self.text.embed_tokens.embed_scale.to(self.dtype)
        self.layer_scale = [float(layer.layer_scalar) for layer in self.layers]
        self.router_weight = [
            layer.router.scale * layer.router.scalar_root_size if self.num_experts > 1 else None
            for layer in self.layers
        ]

    # Text and pictures ------------------------------------------------------------------------------------------------

    def encode_question(self, question: str, has_image: bool = True) -> SplitPrompt:
        """See `Adapter`; raises QuestionError."""
        before, between = (self._before, self._between) if has_image else (self._before_text, [])
        return encode_question(self.tokenizer, question, self.max_positions, before, between, self._behind)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Adapter`."""
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def vision_sizes(self, height: int, width: int, vision_budget: int) -> VisionSizes:
        """See `Adapter`; raises ImageError, and ConfigError for a budget that the image processor does not take."""
        if vision_budget not in SOFT_TOKENS.values():
            raise ConfigError(
                f"a vision budget of Gemma 4 is {vision_budget} soft tokens; it must be one of "
                f"{sorted(SOFT_TOKENS.values())}"
            )
        side, pool = self.image_processor.patch_size, self.image_processor.pooling_kernel_size
        try:
            new_height, new_width = get_aspect_ratio_preserving_size(height, width, side, vision_budget * pool**2, pool)
        except (ValueError, ZeroDivisionError) as error:
            raise ImageError(f"the image is {width}x{height} pixels and cannot be resized: {error}") from error
        count = (new_height // side) * (new_width // side)
        return VisionSizes(count, count // pool**2, count * count)

    def max_image_tokens(self, vision_budget: int) -> int:
        """See `Adapter`."""
        return vision_budget

    def prepare(self, image: Image.Image | None, prompt: SplitPrompt, vision_budget: int) -> Gemma4Request:
        """See `Adapter`; raises ImageError."""
        if image is None:
            return Gemma4Request(torch.tensor(prompt.text_ids), None, None, None, VisionSizes(0, 0))
        sizes = self.vision_sizes(image.height, image.width, vision_budget)
        inputs = self.image_processor(images=image, max_soft_tokens=vision_budget, return_tensors="pt")
        start, count = len(prompt.ids_before), sizes.num_image_tokens
        return Gemma4Request(
            torch.tensor([*prompt.ids_before, *[self.image_id] * count, *prompt.ids_behind]),
            (start, start + count),
            # The processor fills up to the budget; the encoder would spend as long on that as on patches.
            inputs["pixel_values"][0, : sizes.num_units],
            inputs["image_position_ids"][0, : sizes.num_units],
            sizes,
        )

    def encode_vision(self, requests: Sequence[Gemma4Request]) -> list[Tensor]:
        """See `Adapter`; soft tokens of every request, `(image tokens, d_model)`."""
        patches = [cast(Tensor, request.patches) for request in requests]
        places = [cast(Tensor, request.places) for request in requests]
        found: Any = self.model.model.vision_tower(
            torch.nn.utils.rnn.pad_sequence(patches, batch_first=True).to(self.device),
            torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1).to(self.device),
            return_dict=True,
        )
        soft: Tensor = self.model.model.embed_vision(found.last_hidden_state)
        return list(soft.split([request.vision_sizes.num_image_tokens for request in requests]))

    # The decoder ------------------------------------------------------------------------------------------------------

    def embed(self, request: Gemma4Request, features: Tensor | None) -> EmbeddedPrompt:
        """See `Adapter`."""
        hidden = self.embed_tokens(request.input_ids.to(self.device))
        if features is None or request.span is None:
            return EmbeddedPrompt(hidden)
        start, end = request.span
        hidden = torch.cat([hidden[:start], features.to(hidden.dtype), hidden[end:]])
        return EmbeddedPrompt(hidden, seen_both_ways=request.span if self.sees_pictures_both_ways else None)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = F.embedding(token_ids, self.text.embed_tokens.weight) * self.embed_scale
        return out

    def rope(self, positions: Tensor) -> Rope:
        """See `Adapter`; cosines and sines of every type of layer."""
        weight, tables = self.text.embed_tokens.weight, []
        for kind in self.layer_types:
            tables += [table[:, None] for table in self.text.rotary_emb(weight, positions, kind)]
        return tuple(tables)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight if norm.with_scale else None, self.eps)

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        layer = self.layers[block]
        attention, normed = layer.self_attn, self._norm(layer.input_layernorm, x)
        size, cos, sin = attention.head_dim, rope[self.table[block]], rope[self.table[block] + 1]
        q = self._norm(attention.q_norm, attention.q_proj(normed).unflatten(-1, (-1, size))).transpose(1, 2)
        keys = attention.k_proj(normed).unflatten(-1, (-1, size))
        k = self._norm(attention.k_norm, keys).transpose(1, 2)
        # Full blocks may take their values from the projection of keys.
        values = keys if attention.v_proj is None else attention.v_proj(normed).unflatten(-1, (-1, size))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), self._norm(attention.v_norm, values).transpose(1, 2)

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `Adapter`."""
        layer = self.layers[block]
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=layer.self_attn.scaling, enable_gqa=True
        )
        return self._norm(layer.post_attention_layernorm, layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)))

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`; kept weights are renormalised, then scaled by expert; a dense layer runs beside."""
        layer, scale = self.layers[block], self.layer_scale[block]
        out: Tensor = layer.mlp(self._norm(layer.pre_feedforward_layernorm, x))
        if self.num_experts > 1:
            mixed = self._experts(block, x.flatten(0, 1), *spread_top_k(top_k, x.shape[1])).view_as(x)
            out = self._norm(layer.post_feedforward_layernorm_1, out)
            out = out + self._norm(layer.post_feedforward_layernorm_2, mixed)
        out = self._norm(layer.post_feedforward_layernorm, out)
        # The layer's scale is one of the whole stream, of which the caller adds the old one.
        return out if scale == 1.0 else torch.add(out * scale, x, alpha=scale - 1.0)

    def _experts(self, block: int, flat: Tensor, widest: int, keep: Tensor | None) -> Tensor:
        layer = self.layers[block]
        routed = F.rms_norm(flat, flat.shape[-1:], self.router_weight[block], self.eps)
        shares = layer.router.proj(routed).softmax(-1, dtype=torch.float32)
        weights, experts = shares.topk(widest, dim=-1)
        if keep is not None:
            weights = weights * keep
        weights = weights / weights.sum(-1, keepdim=True) * layer.router.per_expert_scale[experts]
        of_layer, normed = layer.experts, self._norm(layer.pre_feedforward_layernorm_2, flat)
        return run_experts(
            normed, weights.to(flat.dtype), experts, of_layer.gate_up_proj, of_layer.down_proj, keep, of_layer.act_fn
        )

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.model.lm_head(self._norm(self.text.norm, x))
        return out if self.soft_cap is None else torch.tanh(out / self.soft_cap) * self.soft_cap


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
