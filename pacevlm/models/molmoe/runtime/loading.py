"""Loading a MolmoE directory, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from pacevlm.errors import CheckpointError, ConfigError
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.layouts import molmoe_layouts
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.runtime.adapter import MolmoEAdapter
from pacevlm.models.registry import Family
from pacevlm.models.weights import Layout, check_weights, load_weights


def load_molmoe(folder: Path, device: torch.device, dtype: torch.dtype) -> MolmoEAdapter:
    """Load model and processor from a directory; on the device `meta` no weights are read.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    model = torch.nn.Module.to(_without_weights(folder), dtype)  # transformers' own `to` is not typed
    try:
        processor = MolmoEProcessor.from_pretrained(folder)
    except ConfigError as error:
        raise CheckpointError(f"the processor in {folder} cannot be used: {error}") from error
    _check_processor(folder, processor, cast(MolmoEConfig, model.config))
    if device.type == "meta":
        return MolmoEAdapter(model, processor)
    stored = check_weights(folder, molmoe_layouts(model))
    # The adapter joins some weights into one, so it is made while they are empty: then nothing is in memory twice.
    adapter = _make_adapter(torch.nn.Module.to_empty(model, device=device), processor)
    load_weights(stored, molmoe_layouts(model))
    return adapter


def _make_adapter(model: MolmoEForConditionalGeneration, processor: MolmoEProcessor) -> MolmoEAdapter:
    device = model.device
    if device.type == "cpu" and model.dtype == torch.float32 and find_spec("numba") is not None:
        from pacevlm.models.molmoe.runtime.compiled_adapter import CompiledMolmoEAdapter

        return CompiledMolmoEAdapter(model, processor)
    if device.type == "cuda" and find_spec("triton") is not None:
        from pacevlm.models.molmoe.runtime.triton_adapter import TritonMolmoEAdapter, compiles_here

        if compiles_here(device):
            return TritonMolmoEAdapter(model, processor)
    return MolmoEAdapter(model, processor)


def layouts_of_molmoe(folder: Path) -> Mapping[str, Layout]:
    """The tensors that a checkpoint with the folder's `config.json` holds; raises CheckpointError."""
    return molmoe_layouts(_without_weights(folder))


def _without_weights(folder: Path) -> MolmoEForConditionalGeneration:
    try:
        config = MolmoEConfig.from_pretrained(folder)
        with torch.device("meta"):
            return MolmoEForConditionalGeneration(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:
        # A damaged config.json makes almost anything: TypeError, ZeroDivisionError, AttributeError, OSError ...
        raise CheckpointError(f"{folder / 'config.json'} describes no MolmoE model: {error}") from error


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


FAMILY = Family(load_molmoe, layouts_of_molmoe)
