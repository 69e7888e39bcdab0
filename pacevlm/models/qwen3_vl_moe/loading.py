"""Loading a Qwen3-VL-MoE directory, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from pacevlm.models.pretrained import model_without_weights, plain_layout, read_model
from pacevlm.models.qwen3_vl.loading import with_processors
from pacevlm.models.qwen3_vl_moe.adapter import Qwen3VLMoeAdapter
from pacevlm.models.registry import Family
from pacevlm.models.weights import Layout, Place


def load_qwen3_vl_moe(folder: Path, device: torch.device, dtype: torch.dtype) -> Qwen3VLMoeAdapter:
    """Load model, tokenizer and image processor from a directory; runs no code from there. `meta` reads no weights.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    model = model_without_weights(folder, Qwen3VLMoeForConditionalGeneration, "Qwen3-VL-MoE").to(dtype)
    if device.type != "meta":
        model = read_model(folder, Qwen3VLMoeForConditionalGeneration, dtype, "Qwen3-VL-MoE", _layouts(model))
    return Qwen3VLMoeAdapter(*with_processors(folder, model, device))


def layouts_of_qwen3_vl_moe(folder: Path) -> Mapping[str, Layout]:
    """The tensors that a checkpoint with the folder's `config.json` holds; raises CheckpointError."""
    return _layouts(model_without_weights(folder, Qwen3VLMoeForConditionalGeneration, "Qwen3-VL-MoE"))


def _layouts(model: Any) -> dict[str, Layout]:
    """Names are those in memory. As published, the experts' matrices are transposed, and transformers undoes it."""
    plain = plain_layout(model)
    transposed = {
        name: Place(place.target.transpose(1, 2)) if ".mlp.experts." in name else place for name, place in plain.items()
    }
    return {"published": transposed, "untransposed": plain}


FAMILY = Family(load_qwen3_vl_moe, layouts_of_qwen3_vl_moe)
