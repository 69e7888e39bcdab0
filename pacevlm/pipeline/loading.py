"""From settings to a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pacevlm.config import ModelConfig, PictureConfig
from pacevlm.devices import resolve_device
from pacevlm.errors import ConfigError
from pacevlm.knobs import KnobSpace
from pacevlm.models.elastic import DEFAULT_MAX_CROPS, ElasticModel, read_elastic_settings
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.pacer import DTYPES


def load_elastic_model(config: ModelConfig, picture: PictureConfig | None = None) -> ElasticModel:
    """The model that the settings describe, and how it reads pictures.

    Raises:
        CheckpointError: the model directory or a file in it is missing, damaged or of another model.
        ConfigError: the device is not there, or tiers and crop limits differ in number.
        KnobError: the model cannot run a knob value.
    """
    device = resolve_device(config.device)
    folder = EMBEDDED_DIR if config.path == "embedded" else Path(config.path)
    stored = read_elastic_settings(folder) if folder.is_dir() else {}
    space = KnobSpace.from_dict(stored.get("knob_space", KnobSpace().to_dict()))
    wanted = {name: getattr(config, name) for name in ("tiers", "top_ks", "num_blocks")}
    space = dataclasses.replace(space, **{name: values for name, values in wanted.items() if values is not None})
    max_crops = None
    if config.max_crops is not None:
        if len(config.max_crops) != len(space.tiers):
            raise ConfigError(f"max_crops {config.max_crops} needs one number for each of the tiers {space.tiers}")
        max_crops = dict(stored.get("max_crops", DEFAULT_MAX_CROPS)) | dict(
            zip(space.tiers, config.max_crops, strict=True)
        )
    return ElasticModel.from_pretrained(
        config.path,
        knob_space=space,
        device=device,
        dtype=DTYPES[config.dtype],
        stage2_after=config.stage2_after,
        policy=config.block_policy,
        max_crops=max_crops,
        max_new_tokens=config.max_new_tokens,
        picture_config=picture,
    )
