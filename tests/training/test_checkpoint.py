"""Checkpoints: what was saved comes back to the bit, or not at all and with a reason."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from pacevlm.errors import CheckpointError, IdentityError, StorageError
from pacevlm.files import load_safetensors, load_safetensors_metadata, save_safetensors_atomic
from pacevlm.training.checkpoint import Checkpoint, load_checkpoint, remove_leftovers, save_checkpoint

IDENTITY = {"model": "m", "config": {"lr": 0.1, "values": (1, 2)}}
MULTIPLIER = {"integral": 0.1, "rate": 1 / 3, "multiplier": 0.7, "num_updates": 3.0}


def make(width: int = 5, seed: int = 0) -> tuple[dict[str, nn.Module], torch.optim.Adam]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
    return {"controller": module}, torch.optim.Adam(module.parameters(), lr=0.1)


def train(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        modules["controller"](torch.full((2, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()


def weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in modules["controller"].state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def save(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int = 2) -> None:
    save_checkpoint(path, step=step, identity=IDENTITY, multiplier=MULTIPLIER, modules=modules, optimizer=optimizer)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    modules, optimizer = make()
    train(modules, optimizer, 2)
    path = tmp_path / "checkpoint.safetensors"
    save(path, modules, optimizer)
    return path


def test_training_goes_on_to_the_bit(saved: Path) -> None:
    modules, optimizer = make()
    train(modules, optimizer, 2)
    resumed, resumed_optimizer = make(seed=1)
    checkpoint = load_checkpoint(saved, IDENTITY)
    checkpoint.restore(resumed, resumed_optimizer)
    assert (checkpoint.step, checkpoint.multiplier) == (2, MULTIPLIER)
    train(modules, optimizer, 3)
    train(resumed, resumed_optimizer, 3)
    assert equal(weights(modules), weights(resumed))


def test_the_first_checkpoint_has_no_optimizer_state_yet(tmp_path: Path) -> None:
    modules, optimizer = make()
    save(tmp_path / "c", modules, optimizer, step=0)
    resumed, resumed_optimizer = make(seed=1)
    load_checkpoint(tmp_path / "c", IDENTITY).restore(resumed, resumed_optimizer)
    assert equal(weights(modules), weights(resumed))
    assert not resumed_optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({**IDENTITY, "model": "n"}, "model was 'm', now 'n'"),
        ({**IDENTITY, "config": {"lr": 0.2, "values": (1, 2)}}, "config.lr was 0.1, now 0.2"),
        ({"model": "m", "config": {"lr": 0.1}}, "config.values"),
        ({**IDENTITY, "data": "d"}, "data was 'nothing', now 'd'"),
    ],
)
def test_another_identity_is_refused_by_name(saved: Path, identity: dict[str, object], named: str) -> None:
    with pytest.raises(IdentityError, match=named.replace("(", r"\(")):
        load_checkpoint(saved, identity)


def test_a_damaged_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for size in (0, 7, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load_checkpoint(saved, IDENTITY)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_checkpoint(saved.with_name("absent"), IDENTITY)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    save_safetensors_atomic({"w": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        load_checkpoint(tmp_path / "w")
    save_safetensors_atomic({"w": torch.ones(2)}, tmp_path / "w", {"checkpoint": "[]"})
    with pytest.raises(CheckpointError, match="must have the keys"):
        load_checkpoint(tmp_path / "w")


def test_a_changed_number_and_a_word_too_many_are_refused(saved: Path) -> None:
    tensors, metadata = load_safetensors(saved), load_safetensors_metadata(saved)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim())
    for changed, words in (
        ({**tensors, name: tensors[name] + 1.0}, metadata),
        (tensors, {**metadata, "extra": ""}),
        (tensors, {**metadata, "checkpoint": metadata["checkpoint"].replace('"step": 2', '"step": 1')}),
        (tensors, {"checkpoint": metadata["checkpoint"]}),
    ):
        save_safetensors_atomic(changed, saved, words)
        with pytest.raises(CheckpointError, match="was changed or damaged"):
            load_checkpoint(saved, IDENTITY)
    save_safetensors_atomic(tensors, saved, metadata)
    assert load_checkpoint(saved, IDENTITY).step == 2


def test_weights_that_do_not_fit_change_nothing(saved: Path) -> None:
    wider, optimizer = make(width=6)
    before = weights(wider)
    checkpoint = load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"controller\.0\.weight"):
        checkpoint.restore(wider, optimizer)
    assert equal(before, weights(wider))
    modules, optimizer = make(seed=1)
    before = weights(modules)
    surplus = Checkpoint(2, {}, {}, {**checkpoint.tensors, "reference.0.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"reference\.0\.weight"):
        surplus.restore(modules, optimizer)
    assert equal(before, weights(modules))


def test_a_full_disk_leaves_the_checkpoint_before(saved: Path) -> None:
    before = saved.read_bytes()
    modules, optimizer = make(seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # a file that cannot grow stands for a disk that is full
    try:
        with pytest.raises(StorageError, match="could not be written"):
            save(saved, modules, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_disk_that_fails_late_leaves_the_checkpoint_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    modules, optimizer = make(seed=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save(saved, modules, optimizer)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_leftovers_of_killed_writers_go_and_nothing_else(saved: Path) -> None:
    saved.with_name(f".{saved.name}.0123abcd.tmp").write_bytes(b"half")
    other = saved.with_name(".metrics.jsonl.0123abcd.tmp")
    other.write_bytes(b"")
    remove_leftovers(saved)
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, other.name])
