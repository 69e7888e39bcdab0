"""Loading a MolmoE directory, with errors a user can act on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import logging

from pacevlm.errors import CheckpointError, ConfigError
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter


def load_molmoe(folder: Path, device: torch.device, dtype: torch.dtype) -> MolmoEAdapter:
    """Load model and processor from a directory.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = MolmoEForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:
        # A damaged config.json makes almost anything: TypeError, ZeroDivisionError, AttributeError, OSError ...
        raise CheckpointError(f"{folder} does not hold a loadable MolmoE checkpoint: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    model, info = cast("tuple[MolmoEForConditionalGeneration, dict[str, Any]]", loaded)
    wrong = {k: sorted(info[k])[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
    if wrong:
        raise CheckpointError(
            f"the weights in {folder} do not belong to its config.json ({wrong}, ...); was a file swapped?"
        )
    try:
        processor = MolmoEProcessor.from_pretrained(folder)
    except ConfigError as error:
        raise CheckpointError(f"the processor in {folder} cannot be used: {error}") from error
    _check_processor(folder, processor, cast(MolmoEConfig, model.config))
    torch.nn.Module.to(model, device)  # transformers' own `to` is not typed
    if device.type == "cpu" and dtype == torch.float32 and find_spec("numba") is not None:
        from pacevlm.models.molmoe.runtime.compiled_adapter import CompiledMolmoEAdapter

        return CompiledMolmoEAdapter(model, processor)
    if device.type == "cuda" and find_spec("triton") is not None:
        from pacevlm.models.molmoe.runtime.triton_adapter import TritonMolmoEAdapter, compiles_here

        if compiles_here(device):
            return TritonMolmoEAdapter(model, processor)
    return MolmoEAdapter(model, processor)


def _check_processor(folder: Path, processor: MolmoEProcessor, config: MolmoEConfig) -> None:
    """Refuse a processor that cuts other crops or knows other tokens than the model."""
    geometry = processor.image_processor.geometry
    cuts = {
        "crop size": geometry.crop_size,
        "patch size": geometry.patch_size,
        "margins": tuple(geometry.margins),
        "pool": (geometry.pool, geometry.pool),
    }
    takes = {
        "crop size": config.vision_backbone["image_default_input_size"][0],
        "patch size": config.vision_backbone["image_patch_size"],
        "margins": tuple(config.overlap_margins),
        "pool": (config.image_pooling_h, config.image_pooling_w),
    }
    for name, given in cuts.items():
        if given != takes[name]:
            raise CheckpointError(
                f"the processor in {folder} works with {name} {given}, but the model takes {takes[name]}; was a file "
                "swapped?"
            )
    special = processor.special_token_ids
    text_id = max(special.bos, processor.tokenizer.vocab_size - 1)
    image_id = max(special.im_start, special.im_end, special.im_patch, special.im_col)
    num_all = config.num_embeddings + config.additional_vocab_size
    if text_id >= config.num_embeddings or image_id >= num_all:
        raise CheckpointError(
            f"the tokenizer in {folder} has text ids up to {text_id} and image ids up to {image_id}, but the model "
            f"embeds {config.num_embeddings} and {num_all} tokens; was a file swapped?"
        )
