"""MolmoE behind the adapter interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacevlm.models.adapter import RowDecode
from pacevlm.models.molmoe.blocks import MolmoEBlock, Rope, rope_tables
from pacevlm.models.molmoe.modeling_molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.processing import MolmoEProcessor, PreparedRequest, assemble_request
from pacevlm.models.molmoe.runtime.frozen_block import FrozenBlock
from pacevlm.models.molmoe.runtime.frozen_tower import FrozenTower
from pacevlm.types import VisionSizes


@dataclass(frozen=True, slots=True)
class MolmoEPrompt:
    """Token ids before and behind the image, BOS not included."""

    ids_before: list[int]
    ids_behind: list[int]

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens, BOS included."""
        return 1 + len(self.ids_before) + len(self.ids_behind)


class MolmoEAdapter:
    """Adapter of a MolmoE model and its processor; see `pacevlm.models.adapter.Adapter` for the methods.

    Attributes:
        blocks: what runs the decoder's blocks.
        tower: what runs the vision tower.
        cos, sin: rotary tables of all positions, each `(positions, head_dim)`.
    """

    renormalises_top_k = False

    def __init__(self, model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> None:
        model.train(False)
        self.model = model.requires_grad_(False)
        self.processor = processor
        self.config = model.config
        self.num_blocks: int = self.config.n_layers
        self.num_experts: int = self.config.moe_num_experts
        self.trained_top_k: int = self.config.moe_top_k
        self.d_model: int = self.config.d_model
        self.head_dim: int = self.config.head_dim_
        self.eos_token_id: int = processor.special_token_ids.bos
        self.max_positions: int = self.config.max_position_embeddings
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.blocks: Sequence[Any] = [
            FrozenBlock.from_module(cast(MolmoEBlock, block)) for block in model.model.transformer.blocks
        ]
        self.tower = FrozenTower(model.model.vision_backbone.image_vit)
        positions = torch.arange(self.max_positions, device=self.device)
        self.cos, self.sin = (
            table[0, 0] for table in rope_tables(positions[None], self.head_dim, self.config.rope_theta)
        )

    def encode_question(self, question: str) -> MolmoEPrompt:
        """See `Adapter`; raises QuestionError."""
        return MolmoEPrompt(*self.processor.encode_question(question))

    def question_embedding(self, prompt: MolmoEPrompt) -> Tensor:
        """See `Adapter`."""
        ids = torch.tensor(prompt.ids_before + prompt.ids_behind, device=self.device)
        return F.embedding(ids, self.model.model.transformer.wte.embedding).float().mean(0).cpu()

    def vision_sizes(self, height: int, width: int, max_crops: int) -> VisionSizes:
        """See `Adapter`; raises ImageError."""
        sizes: VisionSizes = self.processor.image_processor.vision_sizes(height, width, max_crops)
        return sizes

    def prepare(self, image: Image.Image, prompt: MolmoEPrompt, max_crops: int) -> PreparedRequest:
        """See `Adapter`; raises ImageError."""
        prepared = self.processor.image_processor.prepare(image, max_crops)
        return assemble_request(prompt.ids_before, prompt.ids_behind, prepared, self.processor.special_token_ids)

    def encode_vision(self, requests: Sequence[PreparedRequest]) -> list[Tensor]:
        """See `Adapter`."""
        images = torch.cat([cast(Tensor, r.images) for r in requests]).to(self.device)
        masks = torch.cat([cast(Tensor, r.image_masks) for r in requests]).to(self.device)
        features: Tensor = self.model.model.vision_backbone(images, masks, self.tower)
        return list(features.split([r.vision_sizes.num_crops for r in requests]))

    def embed(self, request: PreparedRequest, features: Tensor) -> Tensor:
        """See `Adapter`."""
        index = cast(Tensor, request.image_input_idx).to(self.device)
        ids = request.input_ids.to(self.device)
        embeddings: Tensor = self.model.model.embed(ids[None], features[None], index[None])
        return embeddings[0]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """See `Adapter`."""
        return F.embedding(token_ids, self.model.model.transformer.wte.embedding)

    def rope(self, position_ids: Tensor) -> Rope:
        """See `Adapter`."""
        return F.embedding(position_ids, self.cos)[:, None], F.embedding(position_ids, self.sin)[:, None]

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        q, k, v = self.blocks[block].project(x, rope)
        return q, k, v

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.blocks[block].attend(q, k, v, mask, is_causal)
        return out

    def project_out(self, block: int, mixed: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.blocks[block].project_out(mixed)
        return out

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.blocks[block].mix_experts(x, top_k)
        return out

    def row_decode(self, num_tokens: int) -> RowDecode | None:
        """See `Adapter`."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        out: Tensor = self.model.lm_head(self.model.model.transformer.ln_f(x))
        return out

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Adapter`."""
        text = self.processor.tokenizer.decode(np.asarray(token_ids, dtype=np.int64), skip_special_tokens=True)
        return cast(str, text).strip()
