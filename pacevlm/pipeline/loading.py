"""From settings to a model."""

from __future__ import annotations

from typing import Any

from pacevlm.config import ModelConfig, PictureConfig
from pacevlm.models.elastic import ElasticModel
from pacevlm.pacer import DTYPES


def load_elastic_model(config: ModelConfig, picture: PictureConfig | None = None) -> ElasticModel:
    """The model that the settings describe, and how it reads pictures; raises as `ElasticModel.from_pretrained`."""
    return ElasticModel.from_pretrained(
        config.path,
        knob_space=knob_lists(config),
        device=config.device,
        dtype=DTYPES[config.dtype],
        stage2_after=config.stage2_after,
        block_order=config.block_order,
        vision_budgets=config.vision_budgets,
        max_new_tokens=config.max_new_tokens,
        picture_config=picture,
    )


def knob_lists(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """The lists of the knob space that the settings give, by name."""
    lists = {name: getattr(config, name) for name in ("tiers", "top_ks", "num_blocks")}
    return {name: values for name, values in lists.items() if values is not None}
