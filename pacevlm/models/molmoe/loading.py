"""Loading a MolmoE directory, with errors a user can act on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from pacevlm.errors import CheckpointError, ConfigError
from pacevlm.files import read_json
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.adapter import MolmoEAdapter
from pacevlm.models.molmoe.processing import MolmoEProcessor


def load_molmoe(folder: Path, device: str | torch.device, dtype: torch.dtype) -> MolmoEAdapter:
    """Load model and processor from a directory.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, of another model, or lacks tensors.
    """
    config = read_json(folder / "config.json", "model configuration", CheckpointError)
    if not isinstance(config, dict) or config.get("model_type") != MolmoEConfig.model_type:
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of type {kind!r}; pacevlm runs {MolmoEConfig.model_type!r}"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error}); copy it again") from error
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = MolmoEForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not hold a loadable MolmoE checkpoint: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    wrong = {k: sorted(info[k])[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
    if wrong:
        raise CheckpointError(
            f"the weights in {folder} do not belong to its config.json ({wrong}, ...); was a file swapped?"
        )
    processor = MolmoEProcessor.from_pretrained(folder)
    size = config.get("vision_backbone", {}).get("image_default_input_size", [None])[0]
    if size is not None and processor.image_processor.geometry.crop_size != size:
        raise CheckpointError(
            f"the processor in {folder} cuts crops of {processor.image_processor.geometry.crop_size} px, but the model "
            f"takes {size} px; was a file swapped?"
        )
    return MolmoEAdapter(model.to(device), processor)
