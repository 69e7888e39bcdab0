"""Where a model lies: a folder, the embedded one, a cache of the Hugging Face hub, or a hub id; torch is not needed."""

from __future__ import annotations

import os
from pathlib import Path

from pacevlm.config import is_hub_id
from pacevlm.errors import CheckpointError
from pacevlm.files import read_bytes, read_json
from pacevlm.models.embedded import EMBEDDED_DIR

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# What text and pictures become, under all the names that families use.
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.json", "chat_template.jinja", "generation_config.json"),
)
# All that is ever fetched: weights, settings and tokenizers, never code and never pickles.
_FETCHED = ("config.json", "elastic.json", INDEX_FILE, "*.safetensors", *PROCESSOR_FILES)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def find_model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that a model path means.

    Args:
        path: a folder; `embedded`; a hub cache's folder `models--OWNER--NAME`, of which it is the snapshot of `main`;
            or a hub id `OWNER/NAME`, which is fetched unless the cache holds all of it.

    Raises:
        CheckpointError: there is no such folder, or the hub does not give it.
    """
    if os.fspath(path) == "embedded":
        return EMBEDDED_DIR
    folder = Path(path)
    if folder.is_dir():
        is_cache = (folder / "snapshots").is_dir() and not (folder / "config.json").exists()
        return _snapshot_of_main(folder) if is_cache else folder
    if is_hub_id(os.fspath(path)):
        return _fetch(os.fspath(path))
    raise CheckpointError(
        f"there is no model directory {os.fspath(path)!r}; give a directory with config.json and safetensors files, a "
        "hub id such as allenai/MolmoE-1B-0924, or 'embedded'"
    )


def _snapshot_of_main(cache: Path) -> Path:
    reference = cache / "refs" / "main"
    if reference.is_file():
        revision = read_bytes(reference, "reference of a hub cache", CheckpointError, max_bytes=1000)
        folder = cache / "snapshots" / revision.decode(errors="replace").strip()
        if folder.parent == cache / "snapshots" and folder.is_dir():
            return folder
    there = sorted(folder.name for folder in (cache / "snapshots").iterdir())
    raise CheckpointError(
        f"the hub cache {cache} holds no snapshot of its main revision, only {there}; give one of snapshots/, or fetch "
        "the model again"
    )


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    # What is here goes first: a run must go on without a network, and on the weights it began with.
    for is_local in (True, False):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=list(_FETCHED), local_files_only=is_local))
            weight_files(folder)
            return folder
        except Exception as error:  # of the hub's library, of its HTTP client or of the disk; or a file is not there
            failure = error
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    raise CheckpointError(
        f"there is no model directory {repository!r}, and the Hugging Face hub does not give a model of that name "
        f"({reason}); check the name and the network, or give a directory"
    ) from failure


def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's safetensors files: `model.safetensors`, or those that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: one of them is not there.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
            + (f"; {pickled[0]} is pickled, and that is not loaded: see scripts/convert_pickled" if pickled else "")
        )
    index = read_json(folder / INDEX_FILE, "index of the weights", CheckpointError)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensors to files; copy it again")
    names = sorted(set(files.values()))
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {len(names)} files, of which {len(absent)} are not there: "
            f"{first_of(absent)}; copy them as well"
        )
    return [folder / name for name in names]


def first_of(names: list[str]) -> str:
    """The first three of several names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
