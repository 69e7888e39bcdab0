"""A pickle's tensors become safetensors files that load; what else a pickle may do is not done."""

from __future__ import annotations

import pickle
import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pacevlm.errors import CheckpointError
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.folder import weight_files
from pacevlm.models.inspection import inspect_checkpoint
from pacevlm.models.molmoe.layouts import TRAINING, molmoe_layouts
from pacevlm.models.registry import load_adapter

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_pickled"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("convert_pickled", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_training_checkpoint_becomes_one_that_loads(
    script: ModuleType, tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path: Path
) -> None:
    model = tiny_elastic.adapter.model
    tensors = {
        name: place.target.reshape(place.shape).clone() for name, place in molmoe_layouts(model)[TRAINING].items()
    }
    torch.save(tensors, tmp_path / "model.pt")
    folder = tmp_path / "converted"
    assert script.convert(tmp_path / "model.pt", folder, shard_bytes=100_000) == len(tensors)
    assert len(weight_files(folder)) > 3
    for file in tiny_elastic_dir.glob("*.json"):
        shutil.copy(file, folder)
    assert inspect_checkpoint(folder).layout == TRAINING
    adapter = load_adapter(folder, torch.device("cpu"), torch.float32)
    for name, weight in adapter.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


class Command:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_that_runs_code_is_refused(script: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "written"
    torch.save({"weight": Command(target)}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"weight": Command(target)}))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="cannot be read as a pickle of tensors"):
            script.convert(tmp_path / name, tmp_path / "converted")
    assert not target.exists()
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"weight": torch.ones(2)}}, {"step": 3}])
def test_other_contents_are_refused(script: ModuleType, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        script.convert(tmp_path / "model.pt", tmp_path / "converted")
