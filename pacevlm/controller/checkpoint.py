"""A controller's two files: `controller.json`, which says what it is and what for, and its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pacevlm.artefact import load_artefact, save_artefact
from pacevlm.errors import CheckpointError
from pacevlm.files import load_safetensors, save_safetensors_atomic, sha256_file

JSON_NAME = "controller.json"
WEIGHTS_NAME = "controller.safetensors"
KIND = "controller"
SCHEMA_VERSION = 3
# Far beyond what training gives a weight, and small enough for sums of products of them.
MAX_WEIGHT = 1e6

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
    content = {**content, "weights_sha256": sha256_file(folder / WEIGHTS_NAME)}
    save_artefact(folder / JSON_NAME, KIND, SCHEMA_VERSION, content, CheckpointError)


def read_content(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON file: the content that was written, and `weights_sha256`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind or version.
    """
    return load_artefact(Path(folder) / JSON_NAME, KIND, SCHEMA_VERSION, CheckpointError)


def read_weights(
    folder: str | os.PathLike[str], weights_sha256: str, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read the weights, onto the CPU.

    Args:
        weights_sha256: what the JSON file says of them.
        expected: tensors of the names, shapes and dtypes that the weights must have.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, belongs to another JSON file, does not hold the
            weights that the JSON file describes, or one is not finite or larger than any that training gives.
    """
    path = Path(folder) / WEIGHTS_NAME
    if sha256_file(path) != weights_sha256:
        raise CheckpointError(f"{path} does not belong to the {JSON_NAME} beside it, or is damaged; {_RETRY}")
    tensors = load_safetensors(path)
    shapes = {name: (*tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    expected_shapes = {name: (*tensor.shape, str(tensor.dtype)) for name, tensor in expected.items()}
    wrong = sorted(
        name for name in shapes.keys() | expected_shapes.keys() if shapes.get(name) != expected_shapes.get(name)
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not hold the weights that {JSON_NAME} describes: {len(wrong)} differ, the first is {name} "
            f"with shape {shapes.get(name)} instead of {expected_shapes.get(name)}; {_RETRY}"
        )
    check_tensors(tensors, path)
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a tensor holds NaN, infinity or a number beyond ±`MAX_WEIGHT`."""
    for name, tensor in tensors.items():
        if tensor.numel() and not bool((tensor.double().abs() <= MAX_WEIGHT).all()):
            raise CheckpointError(
                f"{os.fspath(path)} holds numbers in {name} that are not finite or beyond ±{MAX_WEIGHT:g}; {_RETRY}"
            )
