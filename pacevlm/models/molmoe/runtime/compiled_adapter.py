"""MolmoE on a CPU in float32 with compiled loops between its matrix products; needs the extra `cpu`."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.processing import MolmoEProcessor, PreparedRequest
from pacevlm.models.molmoe.runtime import cpu_kernels
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.models.molmoe.runtime.compiled_block import CompiledBlock, CompiledDecode
from pacevlm.models.molmoe.runtime.cpu_kernels import as_floats


class CompiledMolmoEAdapter(MolmoEAdapter):
    """`MolmoEAdapter` with compiled loops; its results are equal but for rounding."""

    compiler = "numba"

    def __init__(self, model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> None:
        super().__init__(model, processor)
        self.blocks = [CompiledBlock(block) for block in self.blocks]
        embeddings, final_norm = model.model.transformer.wte, model.model.transformer.ln_f
        self._embedding = as_floats(embeddings.embedding.detach())
        self._new_embedding = as_floats(embeddings.new_embedding.detach())
        self._final_norm, self._eps = as_floats(final_norm.weight.detach()), np.float32(final_norm.eps)

    def embed(self, request: PreparedRequest, features: Tensor | None) -> EmbeddedPrompt:
        """See `Adapter`."""
        if features is None:
            return super().embed(request, features)
        places = cast(Tensor, request.image_input_idx)
        return EmbeddedPrompt(
            cpu_kernels.embed(request.input_ids, self._embedding, self._new_embedding, features, places)
        )

    def row_decode(self, num_tokens: int) -> CompiledDecode | None:
        """See `Adapter`."""
        blocks = [block for block in self.blocks if isinstance(block, CompiledBlock) and block.is_small]
        if len(blocks) < self.num_blocks:
            return None
        rope = as_floats(self.cos), as_floats(self.sin)
        return CompiledDecode(blocks, rope, num_tokens)

    def logits(self, x: Tensor) -> Tensor:
        """See `Adapter`."""
        return F.linear(cpu_kernels.rms_norm(x, self._final_norm, self._eps), self.model.lm_head.weight)
