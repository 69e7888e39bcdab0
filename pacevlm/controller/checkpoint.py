"""A controller's two files: `controller.json`, which says what it is and what for, and its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pacevlm.errors import CheckpointError
from pacevlm.files import load_safetensors, read_json, save_safetensors_atomic, sha256_file, write_json_atomic

JSON_NAME = "controller.json"
WEIGHTS_NAME = "controller.safetensors"
FORMAT = "pacevlm-controller"
VERSION = 1

_RETRY = "copy the whole folder again, or train the controller again"


def write_checkpoint(folder: str | os.PathLike[str], content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; the JSON file names the weights' SHA-256.

    A crash between the two leaves weights that the older JSON file does not name, and reading refuses them: give
    every checkpoint a folder of its own where the older one must survive.

    Raises:
        StorageError: a file could not be written.
    """
    folder = Path(folder)
    save_safetensors_atomic(tensors, folder / WEIGHTS_NAME)
    header = {"format": FORMAT, "version": VERSION, "weights_sha256": sha256_file(folder / WEIGHTS_NAME)}
    write_json_atomic(folder / JSON_NAME, {**header, **content})


def read_content(folder: str | os.PathLike[str], keys: set[str]) -> dict[str, Any]:
    """Read the JSON file: the content that was written, and `weights_sha256`.

    Args:
        keys: what the content must consist of.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format or version.
    """
    path = Path(folder) / JSON_NAME
    values = read_json(path, "controller", CheckpointError)
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} holds {found}, not {(FORMAT, VERSION)}; give the folder that save_pretrained wrote, or train the "
            "controller again"
        )
    content = {key: value for key, value in values.items() if key not in ("format", "version")}
    if set(content) != keys | {"weights_sha256"}:
        raise CheckpointError(
            f"{path} has the keys {sorted(content)}, not {sorted(keys | {'weights_sha256'})}; {_RETRY}"
        )
    return content


def read_weights(
    folder: str | os.PathLike[str], weights_sha256: object, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read the weights, onto the CPU.

    Args:
        weights_sha256: what the JSON file says of them.
        expected: tensors of the names and shapes that the weights must have.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, belongs to another JSON file, or does not hold
            the weights that the JSON file describes.
    """
    path = Path(folder) / WEIGHTS_NAME
    tensors = load_safetensors(path)
    if sha256_file(path) != weights_sha256:
        raise CheckpointError(f"{path} does not belong to the {JSON_NAME} beside it, or is damaged; {_RETRY}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = sorted(
        name for name in shapes.keys() | expected_shapes.keys() if shapes.get(name) != expected_shapes.get(name)
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not hold the weights that {JSON_NAME} describes: {len(wrong)} differ, the first is {name} "
            f"with shape {shapes.get(name)} instead of {expected_shapes.get(name)}; {_RETRY}"
        )
    return tensors
