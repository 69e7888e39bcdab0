"""Which family runs a checkpoint: found by the `model_type` of its `config.json`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pacevlm.errors import CheckpointError
from pacevlm.files import read_json
from pacevlm.models.adapter import Adapter

# Loads a checkpoint's directory onto a device; raises CheckpointError.
Load = Callable[[Path, torch.device, torch.dtype], Adapter[Any, Any]]

# Families inside the package: module and function, so that a family loads when it is asked for.
_FAMILIES: dict[str, str | Load] = {
    "molmo": "pacevlm.models.molmoe.runtime.loading:load_molmoe",
    "qwen3_vl_moe": "pacevlm.models.qwen3_vl_moe.loading:load_qwen3_vl_moe",
}


def register_family(model_type: str, load: Load) -> None:
    """Let a family outside the package be found.

    Args:
        model_type: as `config.json` names it.
        load: makes the adapter from a directory whose safetensors files are whole.
    """
    _FAMILIES[model_type] = load


def load_adapter(folder: Path, device: torch.device, dtype: torch.dtype) -> Adapter[Any, Any]:
    """The adapter of a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or of a model that no family is known for.
    """
    config = read_json(folder / "config.json", "model configuration", CheckpointError)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of type {model_type!r}; pacevlm runs {sorted(_FAMILIES)}"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error}); copy it again") from error
    load = _FAMILIES[model_type]
    if isinstance(load, str):
        module, _, name = load.partition(":")
        load = getattr(importlib.import_module(module), name)
        assert callable(load)
    return load(folder, device, dtype)
