"""From settings to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pacevlm.config import ModelConfig, PictureConfig
from pacevlm.data.benchmarks import max_new_tokens
from pacevlm.dataset_list import DatasetEntry
from pacevlm.models.elastic import ElasticModel
from pacevlm.pacer import DTYPES


def load_elastic_model(
    config: ModelConfig, picture: PictureConfig | None = None, datasets: Sequence[DatasetEntry] = ()
) -> ElasticModel:
    """The model that the settings describe, and how it reads pictures; raises as `ElasticModel.from_pretrained`.

    Args:
        datasets: what it is asked; the most tokens that a benchmark among them wants are the limit that nobody gave.
    """
    return ElasticModel.from_pretrained(
        config.path,
        knob_space=knob_lists(config),
        device=config.device,
        dtype=DTYPES[config.dtype],
        stage2_after=config.stage2_after,
        block_order=config.block_order,
        vision_budgets=config.vision_budgets,
        max_new_tokens=max_new_tokens(datasets) if config.max_new_tokens is None else config.max_new_tokens,
        picture_config=picture,
    )


def knob_lists(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """The lists of the knob space that the settings give, by name."""
    lists = {name: getattr(config, name) for name in ("tiers", "top_ks", "num_blocks")}
    return {name: values for name, values in lists.items() if values is not None}
