"""Loading a Gemma 4 directory, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForConditionalGeneration, Gemma4ImageProcessorPil

from pacevlm.errors import CheckpointError
from pacevlm.models.gemma4.adapter import SPECIAL_TOKENS, Gemma4Adapter
from pacevlm.models.pretrained import (
    check_image_processor,
    check_tokenizer,
    model_without_weights,
    plain_layout,
    read_model,
    read_processors,
)
from pacevlm.models.registry import Family
from pacevlm.models.weights import Layout


def load_gemma4(folder: Path, device: torch.device, dtype: torch.dtype) -> Gemma4Adapter:
    """Load model, tokenizer and image processor from a directory; runs no code from there. `meta` reads no weights.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    model = model_without_weights(folder, Gemma4ForConditionalGeneration, "Gemma 4").to(dtype)
    _check_config(folder, model.config)
    if device.type != "meta":
        layouts = {"published": plain_layout(model)}
        model = read_model(folder, Gemma4ForConditionalGeneration, dtype, "Gemma 4", layouts)
    tokenizer, image_processor = read_processors(folder, Gemma4ImageProcessorPil)
    vision, vocabulary = model.config.vision_config, model.config.text_config.vocab_size
    check_image_processor(
        folder, image_processor, patch_size=vision.patch_size, pooling_kernel_size=vision.pooling_kernel_size
    )
    check_tokenizer(folder, tokenizer, SPECIAL_TOKENS, model.config.image_token_id, vocabulary)
    torch.nn.Module.to(model, device)  # transformers' own `to` is not typed
    return Gemma4Adapter(model, tokenizer, image_processor)


def layouts_of_gemma4(folder: Path) -> Mapping[str, Layout]:
    """The tensors that a checkpoint with the folder's `config.json` holds; raises CheckpointError."""
    return {"published": plain_layout(model_without_weights(folder, Gemma4ForConditionalGeneration, "Gemma 4"))}


def _check_config(folder: Path, config: Any) -> None:
    """Refuse what the small sizes have, E2B and E4B: it is not run here."""
    text, file = config.text_config, folder / "config.json"
    if config.vision_config is None:
        raise CheckpointError(f"{file} describes a Gemma 4 without pictures, which is not run")
    if text.num_kv_shared_layers or text.hidden_size_per_layer_input:
        raise CheckpointError(
            f"{file} describes a Gemma 4 with {text.num_kv_shared_layers} layers that share caches and inputs of "
            f"{text.hidden_size_per_layer_input} numbers per layer; sizes without both, such as 26B-A4B, are run"
        )
    if text.use_bidirectional_attention == "all":
        raise CheckpointError(f"{file} lets all tokens see each other, which makes no text")


FAMILY = Family(load_gemma4, layouts_of_gemma4)
