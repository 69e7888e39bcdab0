"""A model path means one folder, wherever the weights lie, or gets one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pacevlm.errors import CheckpointError
from pacevlm.models.elastic import ElasticModel, write_elastic_settings
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.models.folder import find_model_folder

REVISION, REPOSITORY = "0123456789abcdef0123456789abcdef01234567", "allenai/Tiny-MolmoE"


@pytest.fixture
def hub(tiny_elastic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the tiny model in it, as the hub's library lays it out: links to blobs."""
    repository = tmp_path / "hub" / "models--allenai--Tiny-MolmoE"
    for folder in ("blobs", "refs", f"snapshots/{REVISION}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(tiny_elastic_dir.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (repository / "snapshots" / REVISION / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_folders_stand_for_themselves(tiny_elastic_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model_folder("embedded") == EMBEDDED_DIR
    assert find_model_folder(tiny_elastic_dir) == tiny_elastic_dir
    monkeypatch.chdir(tiny_elastic_dir.parent.parent)
    relative = Path(tiny_elastic_dir.parent.name) / tiny_elastic_dir.name  # looks like an id
    assert find_model_folder(str(relative)) == relative


def test_a_cache_and_an_id_mean_the_snapshot_of_main(hub: Path, tiny_elastic: ElasticModel) -> None:
    snapshot = hub / "snapshots" / REVISION
    shutil.copytree(snapshot, hub / "snapshots" / "another")
    assert find_model_folder(hub) == snapshot
    assert find_model_folder(REPOSITORY) == snapshot
    assert ElasticModel.from_pretrained(REPOSITORY).identity == tiny_elastic.identity


def test_what_is_measured_lies_in_the_snapshot_and_no_blob_changes(hub: Path) -> None:
    before = {file: file.read_bytes() for file in (hub / "blobs").iterdir()}
    write_elastic_settings(find_model_folder(REPOSITORY), removal=[1, 2, 3])
    assert ElasticModel.from_pretrained(hub).order.removal == (1, 2, 3)
    assert {file: file.read_bytes() for file in (hub / "blobs").iterdir()} == before


@pytest.mark.parametrize("reference", [None, "gone", "../../..", "", "\x00"])
def test_a_cache_without_its_main_revision_is_refused(hub: Path, reference: str | None) -> None:
    (hub / "refs" / "main").unlink()
    if reference is not None:
        (hub / "refs" / "main").write_text(reference)
    with pytest.raises(CheckpointError, match=rf"no snapshot of its main revision, only \['{REVISION}'\]"):
        find_model_folder(hub)


@pytest.mark.parametrize("name", ["nobody/nothing", "allenai/Tiny-MolmoE"])
def test_what_no_hub_gives_is_one_sentence(hub: Path, name: str) -> None:
    (hub / "snapshots" / REVISION / "model.safetensors").unlink()  # as an interrupted fetch leaves it
    with pytest.raises(CheckpointError, match=f"no model directory '{name}', and the Hugging Face hub") as error:
        find_model_folder(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nothing", "/no/where", "a/b/c", "../up/there", "./here/there", "~me/model", "a b/c"])
def test_other_paths_are_not_asked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="no model directory"):
        find_model_folder(path)


def test_weights_settings_and_tokenizers_are_fetched_and_no_code(
    tiny_elastic_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append(options)
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(tiny_elastic_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model_folder(REPOSITORY) == tiny_elastic_dir
    here, fetched = calls
    assert here["local_files_only"]
    patterns = fetched["allow_patterns"]
    files = ["config.json", "model-00001-of-00007.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    refused = ["modeling_molmoe.py", "model.pt", "pytorch_model.bin", "README.md", "optimizer.pt"]
    kept = list(huggingface_hub.utils.filter_repo_objects([*files, *refused], allow_patterns=patterns))
    assert kept == files
