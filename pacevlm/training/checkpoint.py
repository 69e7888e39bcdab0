"""Checkpoints from which a training run goes on exactly: one safetensors file, replaced whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from pacevlm.artefact import Count, Text, typed
from pacevlm.controller.checkpoint import check_tensors
from pacevlm.errors import CheckpointError, IdentityError
from pacevlm.files import load_safetensors, load_safetensors_metadata, parse_json, save_safetensors_atomic
from pacevlm.training.run_record import tensors_sha256

CHECKPOINT_SCHEMA_VERSION = 2
_KIND = "pacevlm training checkpoint"
_ABSENT = "nothing"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on after `step` steps; randomness derives from seed and step, so no generator is here.

    Attributes:
        step: steps that are done.
        identity: what the run was made for, JSON values.
        multiplier: state of the PID controller.
        tensors: weights and optimizer state by name.
    """

    step: int
    identity: dict[str, Any]
    multiplier: dict[str, float]
    tensors: dict[str, Tensor]

    def restore(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimizer state back; nothing changes if they do not fit.

        Args:
            modules: by the names they were saved under.
            optimizer: over parameters of the modules.

        Raises:
            CheckpointError: a tensor is missing, has another shape or dtype, or is one too many.
        """
        weights: dict[str, dict[str, Tensor]] = {}
        used: set[str] = set()
        for module_name, module in modules.items():
            weights[module_name] = {}
            for name, current in module.state_dict().items():
                full_name = f"{module_name}.{name}"
                stored = self.tensors.get(full_name)
                if stored is None or stored.shape != current.shape or stored.dtype != current.dtype:
                    found = _ABSENT if stored is None else f"{stored.dtype} {tuple(stored.shape)}"
                    raise CheckpointError(
                        f"the checkpoint has {found} for {full_name}, which is {current.dtype} {tuple(current.shape)}; "
                        "build the controller with the settings that it was trained with"
                    )
                weights[module_name][name] = stored
                used.add(full_name)
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(_parameter_names(modules, optimizer)):
            prefix = f"optimizer/{name}/"
            entries = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
            used.update(prefix + key for key in entries)
            if entries:  # a parameter that never got a gradient has no state
                state[index] = entries
        unknown = sorted(set(self.tensors) - used)
        if unknown:
            raise CheckpointError(f"the checkpoint holds tensors that this run has no place for: {unknown[:5]}")
        for module_name, module in modules.items():
            module.load_state_dict(weights[module_name])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    path: Path,
    *,
    step: int,
    identity: Mapping[str, Any],
    multiplier: Mapping[str, float],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint in place of the one before; a process killed meanwhile leaves the one before.

    Args:
        step: steps that are done.
        identity: JSON values that a continuation must share.
        modules: every module that is to be restored, by name.
        optimizer: over parameters of the modules, with tensors as its only state.

    Raises:
        StorageError: the file could not be written; the checkpoint before it is untouched.
    """
    tensors: dict[str, Tensor] = {}
    for module_name, module in modules.items():
        tensors |= {f"{module_name}.{name}": value for name, value in module.state_dict().items()}
    names = _parameter_names(modules, optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{names[index]}/{key}": value for key, value in entries.items()}
    header = {
        "kind": _KIND,
        "schema_version": CHECKPOINT_SCHEMA_VERSION,
        "step": step,
        "identity": dict(identity),
        "multiplier": dict(multiplier),
    }
    text = json.dumps(header, allow_nan=False)
    tensors = {name: value.cpu() for name, value in tensors.items()}
    save_safetensors_atomic(tensors, path, {"checkpoint": text, "sha256": _digest(text, tensors)})


class _Header(TypedDict):
    kind: Text
    schema_version: Count
    step: Count
    identity: dict[str, Any]
    multiplier: dict[Text, float]


def load_checkpoint(path: Path, identity: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint and check what it was made for; without `identity` nothing is compared.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt or no training checkpoint.
        IdentityError: it belongs to another model, data set, controller or configuration; the message names what
            differs.
    """
    metadata = load_safetensors_metadata(path)
    text = metadata.get("checkpoint", "")
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is no training checkpoint; check the path") from error
    header = typed(_Header, values, f"the header of {path}", CheckpointError)
    kind, version = header["kind"], header["schema_version"]
    if kind != _KIND or version != CHECKPOINT_SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} holds {kind!r} of schema version {version!r}; this version of pacevlm reads "
            f"{_KIND!r} of schema version {CHECKPOINT_SCHEMA_VERSION}"
        )
    if identity is not None:
        # Through JSON, as the stored one went: tuples become lists.
        _check_identity(path, header["identity"], json.loads(json.dumps(dict(identity))))
    tensors = load_safetensors(path)
    if metadata != {"checkpoint": text, "sha256": _digest(text, tensors)}:
        raise CheckpointError(f"{path} was changed or damaged since it was written; train from an older one, or anew")
    check_tensors(tensors, path)
    return Checkpoint(header["step"], header["identity"], header["multiplier"], tensors)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{text} {tensors_sha256(tensors)}".encode()).hexdigest()


def remove_leftovers(path: Path) -> None:
    """Delete temporary files that killed processes left beside a checkpoint."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    stored, wanted = dict(_flatten(found)), dict(_flatten(expected))
    names = [name for name in dict.fromkeys((*stored, *wanted)) if stored.get(name) != wanted.get(name)]
    if names:
        shown = [f"{name} was {stored.get(name, _ABSENT)!r}, now {wanted.get(name, _ABSENT)!r}" for name in names]
        raise IdentityError(
            f"the checkpoint {path} belongs to another run: {'; '.join(shown)}. Give what the run was started with, "
            "or another run directory"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parameter_names(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of an optimizer's parameters, in the order of its state's indices."""
    names = {
        id(parameter): f"{module_name}.{name}"
        for module_name, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
