"""Loading a Qwen3-VL directory, dense or with experts, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

from pacevlm.errors import CheckpointError
from pacevlm.models.pretrained import (
    check_image_processor,
    check_tokenizer,
    model_without_weights,
    plain_layout,
    read_model,
    read_processors,
)
from pacevlm.models.qwen3_vl.adapter import IMAGE_TOKEN, Qwen3VLAdapter
from pacevlm.models.registry import Family
from pacevlm.models.weights import Layout

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)


def load_qwen3_vl(folder: Path, device: torch.device, dtype: torch.dtype) -> Qwen3VLAdapter:
    """Load model, tokenizer and image processor from a directory; runs no code from there. `meta` reads no weights.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    model = model_without_weights(folder, Qwen3VLForConditionalGeneration, "Qwen3-VL").to(dtype)
    if device.type != "meta":
        layouts = {"published": plain_layout(model)}
        model = read_model(folder, Qwen3VLForConditionalGeneration, dtype, "Qwen3-VL", layouts)
    return Qwen3VLAdapter(*with_processors(folder, model, device))


def layouts_of_qwen3_vl(folder: Path) -> Mapping[str, Layout]:
    """The tensors that a checkpoint with the folder's `config.json` holds; raises CheckpointError."""
    return {"published": plain_layout(model_without_weights(folder, Qwen3VLForConditionalGeneration, "Qwen3-VL"))}


def with_processors(folder: Path, model: Any, device: torch.device) -> tuple[Any, Any, Any]:
    """The model on its device, and the tokenizer and image processor that fit it; raises CheckpointError."""
    tokenizer, image_processor = read_processors(folder, Qwen2VLImageProcessorPil)
    config, vision = model.config.text_config, model.config.vision_config
    if config.hidden_act != "silu":
        raise CheckpointError(f"{folder / 'config.json'} asks for layers with {config.hidden_act}; silu alone is run")
    check_image_processor(
        folder,
        image_processor,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    check_tokenizer(folder, tokenizer, SPECIAL_TOKENS, model.config.image_token_id, config.vocab_size)
    torch.nn.Module.to(model, device)  # transformers' own `to` is not typed
    return model, tokenizer, image_processor


FAMILY = Family(load_qwen3_vl, layouts_of_qwen3_vl)
