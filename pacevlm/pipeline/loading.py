"""From settings to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from pacevlm.config import ModelConfig, PictureConfig, config_to_dict
from pacevlm.data.benchmarks import max_new_tokens
from pacevlm.dataset_list import DatasetEntry, parse_datasets
from pacevlm.errors import ConfigError
from pacevlm.launch import Launch
from pacevlm.models.elastic import ElasticModel
from pacevlm.pacer import DTYPES
from pacevlm.rollout.ranks import current_ranks


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


def load_on_ranks(config: ModelConfig, picture: PictureConfig, datasets: str) -> ElasticModel:
    """`load_elastic_model` of a data set's settings, here and, at the same time, on all other ranks.

    Raises:
        ConfigError: the device has a number, though each rank takes its own.
    """
    ranks = current_ranks()
    if ranks is not None:
        if torch.device(config.device).index is not None:
            raise ConfigError(
                f"device is {config.device!r}, but each rank of a machine takes a device of its own; give "
                f"{config.device.partition(':')[0]!r}, and choose devices with CUDA_VISIBLE_DEVICES"
            )
        ranks.load({"model": config_to_dict(config), "picture": config_to_dict(picture), "datasets": datasets})
    return load_elastic_model(config, picture, parse_datasets(datasets))


def device_of_rank(config: ModelConfig, launch: Launch) -> ModelConfig:
    """The settings with a rank's own device: the one with its number on its machine, or the only one that it sees."""
    kind = config.device
    if kind == "cpu" or torch.get_device_module(kind).device_count() == 1:
        return config
    return dataclasses.replace(config, device=f"{kind}:{launch.local_rank}")


def knob_lists(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """The lists of the knob space that the settings give, by name."""
    lists = {name: getattr(config, name) for name in ("tiers", "top_ks", "num_blocks")}
    return {name: values for name, values in lists.items() if values is not None}
