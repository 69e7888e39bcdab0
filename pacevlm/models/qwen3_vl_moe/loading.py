"""Loading a Qwen3-VL-MoE directory, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.utils import logging

from pacevlm.errors import CheckpointError
from pacevlm.models.qwen3_vl_moe.adapter import IMAGE_TOKEN, Qwen3VLMoeAdapter
from pacevlm.models.registry import Family
from pacevlm.models.weights import Layout, Place, check_weights

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)


def load_qwen3_vl_moe(folder: Path, device: torch.device, dtype: torch.dtype) -> Qwen3VLMoeAdapter:
    """Load model, tokenizer and image processor from a directory; runs no code from there. `meta` reads no weights.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    model = _without_weights(folder).to(dtype)
    if device.type != "meta":
        check_weights(folder, _layouts(model))
        model = _read_weights(folder, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # By name: what the Auto class chooses, and so the pixels, depends on whether torchvision is installed.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # A malformed tokenizer file raises a bare Exception, the other files OSError or ValueError.
        raise CheckpointError(f"the tokenizer or image processor in {folder} cannot be used: {error}") from error
    _check(folder, model, tokenizer, image_processor)
    torch.nn.Module.to(model, device)  # transformers' own `to` is not typed
    return Qwen3VLMoeAdapter(model, tokenizer, image_processor)


def layouts_of_qwen3_vl_moe(folder: Path) -> Mapping[str, Layout]:
    """The tensors that a checkpoint with the folder's `config.json` holds; raises CheckpointError."""
    return _layouts(_without_weights(folder))


def _without_weights(folder: Path) -> Any:
    try:
        config = Qwen3VLMoeConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return Qwen3VLMoeForConditionalGeneration(config)
    except Exception as error:
        # A damaged config.json makes almost anything: TypeError, ZeroDivisionError, AttributeError, OSError ...
        raise CheckpointError(f"{folder / 'config.json'} describes no Qwen3-VL-MoE model: {error}") from error


def _layouts(model: Any) -> dict[str, Layout]:
    """Names are those in memory. As published, the experts' matrices are transposed, and transformers undoes it."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {
        "published": {
            name: Place(weight.transpose(1, 2) if ".mlp.experts." in name else weight)
            for name, weight in weights.items()
        },
        "untransposed": {name: Place(weight) for name, weight in weights.items()},
    }


def _read_weights(folder: Path, dtype: torch.dtype) -> Any:
    # Through transformers, which also computes what no file holds, such as rotary frequencies.
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return Qwen3VLMoeForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(f"{folder} does not hold a loadable Qwen3-VL-MoE checkpoint: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()


def _check(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> None:
    """Refuse experts that are not run here, and a processor that cuts other patches or knows other tokens."""
    config, vision = model.config.text_config, model.config.vision_config
    if config.hidden_act != "silu":
        raise CheckpointError(f"{folder / 'config.json'} asks for experts with {config.hidden_act}; silu alone is run")
    for name, taken in {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }.items():
        given = getattr(image_processor, name, None)
        if given != taken:
            raise CheckpointError(
                f"the image processor in {folder} works with {name} {given}, but the model takes {taken}; was a file "
                "swapped?"
            )
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    if ids != [i for i, t in zip(ids, SPECIAL_TOKENS, strict=True) if tokenizer.convert_ids_to_tokens(i) == t]:
        raise CheckpointError(f"the tokenizer in {folder} lacks one of {SPECIAL_TOKENS}; was a file swapped?")
    if ids[-1] != model.config.image_token_id or len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and {IMAGE_TOKEN} as {ids[-1]}, but the model has "
            f"{config.vocab_size} and {model.config.image_token_id}; was a file swapped?"
        )


FAMILY = Family(load_qwen3_vl_moe, layouts_of_qwen3_vl_moe)
