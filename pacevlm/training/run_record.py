"""`run.json`: what a run was started with, so that its directory alone is enough to repeat it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from pacevlm.artefact import Count, Sha256, Text, load_artefact, save_artefact, typed
from pacevlm.errors import CheckpointError
from pacevlm.latency.profile import DeviceFacts
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Example

RUN_KIND = "training run"
RUN_SCHEMA_VERSION = 2
_PACKAGES = ("pacevlm", "torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers", "pillow")


def write_run_record(
    path: Path,
    *,
    config: TrainConfig,
    identity: Mapping[str, Any],
    initial_weights_sha256: str,
    device: DeviceFacts,
    step: int,
) -> None:
    """Write the record of a new run, or add a start to that of a run that goes on.

    Each start lists the step it began at, time, device, versions and commit: a run that went on elsewhere shows it.

    Raises:
        CheckpointError: there is a record, but it is damaged.
        StorageError: the file could not be written.
    """
    # A new run may follow one that was killed before its first checkpoint: what it was is of no use any more.
    record = read_run_record(path) if path.exists() and step else None
    start = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.to_dict(),
        "versions": installed_versions(),
        "commit": source_commit(),
    }
    content = {
        "config": config.to_dict(),
        "identity": dict(identity),
        "initial_weights_sha256": record["initial_weights_sha256"] if record else initial_weights_sha256,
        "starts": [*(record["starts"] if record else []), start],
    }
    save_artefact(path, RUN_KIND, RUN_SCHEMA_VERSION, content, CheckpointError)


class _Start(TypedDict):
    step: Count
    time: Text
    device: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None


class _RunRecord(TypedDict):
    config: dict[str, Any]
    identity: dict[str, Any]
    initial_weights_sha256: Sha256
    starts: list[_Start]


def read_run_record(path: Path) -> dict[str, Any]:
    """What `write_run_record` wrote; raises CheckpointError if it is missing or damaged."""
    values = load_artefact(path, RUN_KIND, RUN_SCHEMA_VERSION, CheckpointError)
    record: dict[str, Any] = typed(_RunRecord, values, f"the run record {path}", CheckpointError)
    return record


def installed_versions() -> dict[str, str | None]:
    """Versions of this package and of what results depend on; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def source_commit() -> str | None:
    """Git commit of this package's source, with `-dirty` behind it if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie inside the checkout of something else, whose commit says nothing.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def dataset_identity(examples: Sequence[Example]) -> str:
    """SHA-256 of all ids, pictures, questions, references and options, in order."""
    facts = [[e.example_id, e.content_id, e.references, e.choices] for e in examples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's weights by name."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in alphabetical order: names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
