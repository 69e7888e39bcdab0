"""Which family runs a checkpoint: found by the `model_type` of its `config.json`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pacevlm.errors import CheckpointError
from pacevlm.files import read_json
from pacevlm.models.adapter import Adapter
from pacevlm.models.weights import Layout, read_headers

# Loads a checkpoint's directory onto a device; raises CheckpointError.
Load = Callable[[Path, torch.device, torch.dtype], Adapter[Any, Any]]


@dataclass(frozen=True)
class Family:
    """What a model family is known by.

    Attributes:
        load: makes the adapter from a directory whose safetensors files are whole. On the device `meta` it reads no
            weights; what follows from the configuration, the tokenizer and the image processor works there too.
        layouts: the tensors that a checkpoint with a directory's `config.json` holds, by the names of the layouts that
            the family is found in; None where the family does not say.
    """

    load: Load
    layouts: Callable[[Path], Mapping[str, Layout]] | None = None


# Families inside the package by the module that holds their `FAMILY`, so that one loads when it is asked for.
_FAMILIES: dict[str, str | Family] = {
    "gemma4": "pacevlm.models.gemma4.loading",
    "molmo": "pacevlm.models.molmoe.runtime.loading",
    "qwen3_vl": "pacevlm.models.qwen3_vl.loading",
    "qwen3_vl_moe": "pacevlm.models.qwen3_vl_moe.loading",
}


def register_family(model_type: str, load: Load, layouts: Callable[[Path], Mapping[str, Layout]] | None = None) -> None:
    """Let a family outside the package be found.

    Args:
        model_type: as `config.json` names it.
        load: see `Family`.
        layouts: see `Family`.
    """
    _FAMILIES[model_type] = Family(load, layouts)


def find_family(folder: Path) -> tuple[str, Family]:
    """The model type of a checkpoint and its family.

    Raises:
        CheckpointError: there is no `config.json`, or no family is known for what it describes.
    """
    if not (folder / "config.json").exists() and (folder / "config.yaml").exists():
        raise CheckpointError(
            f"{folder} holds a config.yaml of the training repository, but no config.json; put config.json and the "
            "tokenizer's and processor's files of the published model beside the weights"
        )
    config = read_json(folder / "config.json", "model configuration", CheckpointError)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of type {model_type!r}; pacevlm runs {sorted(_FAMILIES)}, and "
            "docs/families.md says how to add a family"
        )
    family = _FAMILIES[model_type]
    if isinstance(family, str):
        try:
            family = importlib.import_module(family).FAMILY
        except ImportError as error:
            if not (error.name or "").startswith("transformers"):
                raise
            raise CheckpointError(
                f"models of type {model_type!r} are run on classes of transformers that the version here, "
                f"{version('transformers')}, lacks ({error}); docs/families.md says which versions have them"
            ) from error
    assert isinstance(family, Family)
    return model_type, family


def load_adapter(folder: Path, device: torch.device, dtype: torch.dtype) -> Adapter[Any, Any]:
    """The adapter of a checkpoint; on the device `meta` without its weights, which are then not looked at.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or of a model that no family is known for.
    """
    _, family = find_family(folder)
    if device.type != "meta":
        read_headers(folder)
    return family.load(folder, device, dtype)
