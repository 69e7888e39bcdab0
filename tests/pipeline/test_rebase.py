"""A controller that is kept on another device: profiled and calibrated anew, its weights as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pacevlm.config import CalibrateConfig, DataConfig, EvaluateConfig, LookupConfig, ModelConfig, ProfileConfig
from pacevlm.controller.policy import Controller
from pacevlm.errors import ConfigError, DataError
from pacevlm.files import sha256_file
from pacevlm.pacer import Pacer
from pacevlm.pipeline import RunConfig, run_pipeline
from pacevlm.pipeline.rebase import rebase_run
from pacevlm.pipeline.step_log import StepLog
from pacevlm.training.grpo import GRPOConfig
from pacevlm.training.train_config import TrainConfig


@pytest.fixture(scope="module")
def source(tiny_elastic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig(
        run_dir=tmp_path_factory.mktemp("rebase") / "run",
        model=ModelConfig(path=str(tiny_elastic_dir), max_new_tokens=2),
        data=DataConfig(num_train=24, num_val=6, num_test=4),
        profile=ProfileConfig(
            num_requests=4, num_samples=24, repeats=1, max_warmup=1, num_lengths=24, alpha=0.4, max_megapixels=0.02
        ),
        lookup=LookupConfig(num_examples=4),
        train=TrainConfig(
            run_dir=Path("train"), steps=2, batch_size=4, budgets_per_example=2, grpo=GRPOConfig(group_size=3)
        ),
        calibrate=CalibrateConfig(num_requests=6),
        evaluate=EvaluateConfig(budgets=(0.8, 1.2), num_timed=1, num_warmup=0),
    )
    run_pipeline(config, "calibrate")
    return config.run_dir


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return Controller.from_pretrained(run_dir / "controller").state_dict()


@pytest.mark.parametrize("transfer", [False, True])
def test_weights_stay_and_all_that_is_of_the_device_is_made_anew(source: Path, tmp_path: Path, transfer: bool) -> None:
    before = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    config = rebase_run(source, tmp_path / "new", num_threads=2, transfer=transfer)
    assert {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()} == before
    old, new = (Controller.from_pretrained(folder / "controller") for folder in (source, config.run_dir))
    for name, weight in old.state_dict().items():
        assert torch.equal(weight, new.state_dict()[name])
    assert old.estimator_fingerprint != new.estimator_fingerprint
    profiled = StepLog(config.run_dir).get("profile")
    assert profiled is not None
    assert new.config.reference_ms == profiled.facts["full_p50_ms"]["e2e"]
    trained = StepLog(config.run_dir).get("train")
    assert trained is not None
    assert trained.facts["rebased_from"] == sha256_file(source / "controller/controller.safetensors")
    # A run like any other: it answers, and goes on.
    pacer = Pacer.from_pretrained(config.run_dir)
    assert pacer.num_threads == 2
    done = json.loads((config.run_dir / "steps.json").read_text())
    assert rebase_run(source, tmp_path / "new", num_threads=2, transfer=transfer) == config
    assert json.loads((config.run_dir / "steps.json").read_text()) == done
    run_pipeline(config, "evaluate")
    assert json.loads((config.run_dir / "steps.json").read_text())["train"] == done["train"]


def test_a_stopped_rebase_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pacevlm.pipeline import rebase

    with monkeypatch.context() as stopped:
        stopped.setattr(rebase, "_keep_controller", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rebase_run(source, tmp_path / "new")
    profile = (tmp_path / "new/profile.json").read_bytes()
    rebase_run(source, tmp_path / "new")
    assert (tmp_path / "new/profile.json").read_bytes() == profile
    assert (tmp_path / "new/bundle/bundle.json").exists()


def test_what_was_begun_otherwise_or_is_another_run_is_refused(source: Path, tmp_path: Path) -> None:
    rebase_run(source, tmp_path / "new")
    with pytest.raises(ConfigError, match="num_threads was 1, now 2"):
        rebase_run(source, tmp_path / "new", num_threads=2)
    # A controller of its own, or of another source, is not taken for the one that is wanted.
    shutil.copytree(source, tmp_path / "own")
    with pytest.raises(ConfigError, match="holds a controller that is not of"):
        rebase_run(source, tmp_path / "own")
    with pytest.raises(ConfigError, match="holds a controller that is not of"):
        rebase_run(tmp_path / "new", tmp_path / "own")


def test_a_rebased_controller_is_never_trained_in_its_place(source: Path, tmp_path: Path) -> None:
    for name in ("controller/controller.safetensors", "train/checkpoint.safetensors"):
        config = rebase_run(source, tmp_path / name.partition("/")[0])
        (config.run_dir / name).unlink()
        with pytest.raises(DataError, match="was rebased, not trained there"):
            run_pipeline(config, "calibrate")


def test_only_a_trained_run_can_be_rebased_and_not_onto_itself(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is kept; give another run_dir"):
        rebase_run(source, source)
    with pytest.raises(ConfigError, match="settings of a run"):
        rebase_run(tmp_path, tmp_path / "new")
    config = RunConfig(run_dir=tmp_path / "untrained")
    from pacevlm.pipeline.run_config import save_run_config

    config.run_dir.mkdir()
    save_run_config(config)
    with pytest.raises(ConfigError, match="holds no trained controller"):
        rebase_run(config.run_dir, tmp_path / "new")
    assert not (tmp_path / "new").exists()
