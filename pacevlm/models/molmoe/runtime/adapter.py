"""MolmoE behind the adapter interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacevlm.models.adapter import Adapter, EmbeddedPrompt, Rope
from pacevlm.models.molmoe.blocks import MolmoEBlock, rope_tables
from pacevlm.models.molmoe.modeling_molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.processing import MolmoEProcessor, PreparedRequest, assemble_request
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock
from pacevlm.models.molmoe.runtime.frozen_tower import FrozenTower
from pacevlm.models.questions import SplitPrompt
from pacevlm.types import VisionSizes

# A tier's vision budget is the most high-resolution crops.
DEFAULT_MAX_CROPS = {"low": 2, "medium": 6, "high": 12}


class MolmoEPrompt(SplitPrompt):
    """Token ids before and behind the image, BOS not included."""

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens, BOS included."""
        return 1 + len(self.ids_before) + len(self.ids_behind)


class MolmoEAdapter(Adapter[MolmoEPrompt, PreparedRequest]):
    """Adapter of a MolmoE model and its processor; see `pacevlm.models.adapter.Adapter` for the methods.

    Attributes:
        blocks: what runs the decoder's blocks.
        tower: what runs the vision tower.
        cos, sin: rotary tables of all positions, each `(positions, head_dim)`.
    """

    default_vision_budgets = DEFAULT_MAX_CROPS

    def __init__(self, model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> None:
        model.train(False)
        self.model = model.requires_grad_(False)
        self.processor = processor
        self.config = model.config
        self.num_blocks: int = self.config.n_layers
        self.num_experts: int = self.config.moe_num_experts
        self.trained_top_k: int = self.config.moe_top_k
        self.d_model: int = self.config.d_model
        self.end_token_ids = frozenset({processor.special_token_ids.bos})
        self.max_positions: int = self.config.max_position_embeddings
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        head_dim: int = self.config.head_dim_
        self.cache_bytes_per_token: int = 2 * self.config.num_key_value_heads * head_dim * self.dtype.itemsize
        self.blocks: Sequence[Any] = [
            FrozenBlock.from_module(cast(MolmoEBlock, block)) for block in model.model.transformer.blocks
        ]
        self.tower = FrozenTower(model.model.vision_backbone.image_vit)
        positions = torch.arange(self.max_positions, device=self.device)
        self.cos, self.sin = (table[0, 0] for table in rope_tables(positions[None], head_dim, self.config.rope_theta))

    def encode_question(self, question: str, has_image: bool = True) -> MolmoEPrompt:
        """See `Adapter`; raises QuestionError."""
        return MolmoEPrompt(*self.processor.encode_question(question, has_image))

    def vision_sizes(self, height: int, width: int, vision_budget: int) -> VisionSizes:
        """See `Adapter`; raises ImageError."""
        sizes: VisionSizes = self.processor.image_processor.vision_sizes(height, width, vision_budget)
        return sizes

    def prepare(self, image: Image.Image | None, prompt: MolmoEPrompt, vision_budget: int) -> PreparedRequest:
        """See `Adapter`; raises ImageError."""
        prepared = None if image is None else self.processor.image_processor.cut(image, vision_budget)
        return assemble_request(prompt.ids_before, prompt.ids_behind, prepared, self.processor.special_token_ids)

    def encode_vision(self, requests: Sequence[PreparedRequest]) -> list[Tensor]:
        """See `Adapter`."""
        images = torch.cat([cast(Tensor, r.images) for r in requests]).to(self.device)
        masks = torch.cat([cast(Tensor, r.image_masks) for r in requests]).to(self.device)
        features: Tensor = self.model.model.vision_backbone(images, masks, self.tower)
        return list(features.split([r.vision_sizes.num_units for r in requests]))

    def embed(self, request: PreparedRequest, features: Tensor | None) -> EmbeddedPrompt:
        """See `Adapter`."""
        ids = request.input_ids.to(self.device)
        if features is None:
            return EmbeddedPrompt(self.model.model.embed(ids[None])[0])
        index = cast(Tensor, request.image_input_idx).to(self.device)
        embeddings: Tensor = self.model.model.embed(ids[None], features[None], index[None])
        return EmbeddedPrompt(embeddings[0])

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """See `Adapter`."""
        return F.embedding(token_ids, self.model.model.transformer.wte.embedding)

    def rope(self, positions: Tensor) -> Rope:
        """See `Adapter`."""
        return F.embedding(positions, self.cos)[:, None], F.embedding(positions, self.sin)[:, None]

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        q, k, v = self.blocks[block].project(x, rope)
        return q, k, v

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.blocks[block].attend(q, k, v, mask, is_causal)
        return out

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.blocks[block].mix_experts(x, top_k)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.model.lm_head(self.model.model.transformer.ln_f(x))
        return out

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Adapter`."""
        text = self.processor.tokenizer.decode(np.asarray(token_ids, dtype=np.int64), skip_special_tokens=True)
        return cast(str, text).strip()
