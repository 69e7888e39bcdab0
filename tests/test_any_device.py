"""Every step runs where it is told to, and gives there what it gives on a CPU without compiled loops."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pacevlm.config import CalibrateConfig, DataConfig, EvaluateConfig, LookupConfig, ModelConfig, ProfileConfig
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.data.metrics import Metric
from pacevlm.data.splits import load_splits
from pacevlm.devices import resolve_device
from pacevlm.errors import ConfigError
from pacevlm.evaluation.importance import measure_importance
from pacevlm.evaluation.records import read_records
from pacevlm.latency import measuring
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profile import Profile, collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe.runtime import loading
from pacevlm.pacer import Pacer
from pacevlm.pipeline import RunConfig, load_elastic_model, run_pipeline
from pacevlm.request.pacing import Pacing
from pacevlm.request.profiling import nominal_pacing
from pacevlm.request.run import run_forced, run_request
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.training.grpo import GRPOConfig
from pacevlm.training.train_config import TrainConfig
from pacevlm.training.trainer import Trainer
from pacevlm.types import Example, Objective

ABSENT = ["meta", "cpu:1", "cuda:7", "xpu:0", "mps", "tpu", "", " cpu", "cuda:-1", "cpu:x", None, 0, True, ["cpu"]]


@pytest.fixture
def plain(tiny_elastic_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ElasticModel:
    """The tiny model on the CPU, without compiled loops."""
    with monkeypatch.context() as without_numba:
        without_numba.setattr(loading, "find_spec", lambda _: None)
        return ElasticModel.from_pretrained(tiny_elastic_dir)


@pytest.fixture
def elsewhere(plain: ElasticModel, tiny_elastic_dir: Path, other_device: str) -> ElasticModel:
    """The same model on another device."""
    model = ElasticModel.from_pretrained(tiny_elastic_dir, device=other_device)
    assert model.device.type == other_device
    assert model.identity == plain.identity
    return model


def make_controller(model: ElasticModel, pacing: Pacing) -> Controller:
    config = ControllerConfig(reference_ms=100.0, embedding_scale=0.25, thumbnail=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controller = Controller(
            config,
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=pacing.guardrail.estimator.fingerprint,
            d_model=model.d_model,
        )
        for name, parameter in controller.named_parameters():
            if "head.weight" in name:
                torch.nn.init.normal_(parameter)
    return controller


# Names


def test_a_device_that_is_there_is_found(other_device: str) -> None:
    for name in ("cpu", "cpu:0", torch.device("cpu")):
        assert resolve_device(name) == torch.device("cpu")
    for name in (other_device, f"{other_device}:0", torch.device(other_device)):
        assert resolve_device(name) in (torch.device(other_device), torch.device(other_device, 0))
    with pytest.raises(ConfigError, match=f"torch sees cpu, {other_device}:0"):
        resolve_device(f"{other_device}:99")


@pytest.mark.parametrize("name", ABSENT, ids=repr)
@pytest.mark.parametrize("load", ["run", "model", "bundle", "facts"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(name: Any, load: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    loads: dict[str, Callable[[], object]] = {
        "run": lambda: run_pipeline(RunConfig(run_dir=tmp_path / "run", model=ModelConfig(missing, device=name))),
        "model": lambda: ElasticModel.from_pretrained(missing, device=name),
        "bundle": lambda: Pacer.from_pretrained(missing, device=name),
        "facts": lambda: collect_device_facts(name, "float32"),
    }
    with pytest.raises(ConfigError, match=r"torch sees cpu.* here; set the device"):
        loads[load]()
    assert not any(tmp_path.iterdir())


def test_more_threads_than_cpus_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"may use 4 CPUs; set profile\.num_threads"):
        run_pipeline(RunConfig(run_dir=tmp_path / "run", profile=ProfileConfig(num_threads=999)))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="num_threads is 5"), use_num_threads(5):
        pass
    monkeypatch.undo()  # from here on, the machine's own
    assert 1 <= measuring.available_threads() <= (os.cpu_count() or 1)
    with use_num_threads(measuring.available_threads()):
        assert torch.get_num_threads() == measuring.available_threads()


# Steps


def test_requests_take_the_same_way(plain: ElasticModel, elsewhere: ElasticModel, law_examples: list[Example]) -> None:
    found = []
    for model in (plain, elsewhere):
        pacing = nominal_pacing(model)
        policy = ControllerPolicy(make_controller(model, pacing).to(model.device))
        results = [
            run_request(model, policy, example.image, example.question, Objective(budget_ms), pacing)
            for example in law_examples
            for budget_ms in (20.0, 80.0, 300.0)
        ]
        found.append([(result.answer, result.token_ids, result.knobs) for result in results])
    assert found[0] == found[1]
    assert len({knobs for _, _, knobs in found[0]}) > 1


def test_rollouts_are_the_same(plain: ElasticModel, elsewhere: ElasticModel, law_examples: list[Example]) -> None:
    jobs = [(example, knobs) for example in law_examples for knobs in plain.knob_space]
    engines = [RolloutEngine(model, max_rows=40) for model in (plain, elsewhere)]
    outcomes = [engine.run(jobs) for engine in engines]
    assert outcomes[0] == outcomes[1]
    for example in law_examples:
        seen = [engine.view(example).question_embedding for engine in engines]
        torch.testing.assert_close(*seen)
        assert all(embedding.is_cpu for embedding in seen)


@pytest.mark.parametrize("controller_device", ["with the model", "on the CPU"])
def test_training_steps_are_the_same(
    plain: ElasticModel, elsewhere: ElasticModel, law_examples: list[Example], tmp_path: Path, controller_device: str
) -> None:
    weights, metrics = [], []
    pacing = nominal_pacing(plain)
    assert pacing.output_length is not None
    for model in (plain, elsewhere):
        controller = make_controller(model, pacing)
        if controller_device == "with the model":
            controller.to(model.device)
        config = TrainConfig(
            run_dir=tmp_path / model.device.type,
            steps=2,
            batch_size=4,
            budgets_per_example=2,
            grpo=GRPOConfig(group_size=4, beta=0.1),
            ema_decay=0.5,
            tensorboard=False,
        )
        engine = RolloutEngine(model, Metric("first", lambda answer, *_: float(answer[:1] < "c")))
        parts = (engine, pacing, law_examples, config)
        Trainer(controller, *parts, 100.0).run(until_step=1)
        # Stopped and begun again: everything is restored onto the device.
        again = Trainer(make_controller(model, pacing).to(next(controller.parameters()).device), *parts, 100.0)
        again.run(on_step=lambda _, found, __: metrics.append(dict(found)))
        assert {p.device.type for p in again.result.parameters()} == {p.device.type for p in controller.parameters()}
        weights.append({name: value.cpu() for name, value in again.result.state_dict().items()})
    start = make_controller(plain, pacing).state_dict()
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-4, rtol=1e-3)
    for name in ("accuracy", "reward", "entropy", "kl"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-5)


def test_the_same_blocks_are_important(
    plain: ElasticModel, elsewhere: ElasticModel, law_examples: list[Example]
) -> None:
    full = plain.knob_space.full
    answers = [outcome.answer for outcome in RolloutEngine(plain).run([(example, full) for example in law_examples])]
    examples = [dataclasses.replace(e, references=(answer,)) for e, answer in zip(law_examples, answers, strict=True)]
    found = [measure_importance(model, examples, min_num_blocks=3, num_candidates=2) for model in (plain, elsewhere)]
    assert found[0].to_dict() == found[1].to_dict()
    assert found[0].removal == found[1].removal


def make_config(run_dir: Path, model: ModelConfig) -> RunConfig:
    return RunConfig(
        run_dir=run_dir,
        model=dataclasses.replace(model, max_new_tokens=2, vision_budgets=(1, 1, 2)),
        data=DataConfig(num_train=24, num_val=4, num_test=3),
        profile=ProfileConfig(
            num_requests=4,
            num_samples=24,
            repeats=1,
            max_warmup=1,
            max_megapixels=0.02,
            num_lengths=24,
            alpha=0.4,
            num_threads=2,
        ),
        lookup=LookupConfig(num_examples=2),
        train=TrainConfig(
            run_dir=Path("train"), steps=2, batch_size=4, budgets_per_example=2, grpo=GRPOConfig(group_size=3)
        ),
        calibrate=CalibrateConfig(num_requests=6),
        evaluate=EvaluateConfig(budgets=(0.7, 1.0), num_timed=1, num_warmup=0),
    )


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else of a tiny run."""
    for name in ("plot_pareto", "plot_knobs", "write_report"):
        monkeypatch.setattr(f"pacevlm.pipeline.outputs.{name}", lambda *_, **__: None)


def test_a_whole_run_and_its_bundle(
    tiny_elastic_dir: Path, other_device: str, tmp_path: Path, without_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "run", ModelConfig(path=str(tiny_elastic_dir), device=other_device))
    run = run_pipeline(config)
    assert run.model.device.type == other_device
    assert {parameter.device.type for parameter in run.controller().parameters()} == {other_device}
    assert Profile.load(config.run_dir / "profile.json").device.device_type == other_device
    (start,) = json.loads((config.run_dir / "train/run.json").read_text())["starts"]
    assert start["device"]["device_type"] == other_device

    with monkeypatch.context() as without_numba:
        without_numba.setattr(loading, "find_spec", lambda _: None)
        plain = load_elastic_model(dataclasses.replace(config.model, device="cpu"))
    examples = {example.example_id: example for example in load_splits(config.data).test}
    records = [record for record in read_records(config.run_dir / "records.jsonl") if record.policy == "controller"]
    assert len(records) == 6
    pacer = Pacer.from_pretrained(config.run_dir, device=other_device)
    for record in records:
        example = examples[record.example_id]
        answer = pacer.answer(example.image, example.question, 10 * pacer.full_p50_ms)
        assert answer.answer == run_forced(plain, example.image, example.question, answer.knobs).answer

    # On a machine with fewer CPUs.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(ConfigError, match="num_threads is 2, but this process may use 1 CPUs"):
        Pacer.from_pretrained(config.run_dir, device=other_device)
    moved = Pacer.from_pretrained(config.run_dir, device=other_device, any_device=True)
    assert moved.num_threads == 1
    assert moved.answer(example.image, example.question, 10 * pacer.full_p50_ms).knobs in moved.model.knob_space


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_run_in_half_precision(
    tiny_elastic_dir: Path, tmp_path: Path, without_figures: None, dtype: Any
) -> None:
    config = make_config(tmp_path / "run", ModelConfig(path=str(tiny_elastic_dir), dtype=dtype))
    run = run_pipeline(config)
    assert str(run.model.dtype) == f"torch.{dtype}"
    pacer, example = Pacer.from_pretrained(config.run_dir), run.splits.test[0]
    answer = pacer.answer(example.image, example.question, 10 * pacer.full_p50_ms)
    assert answer.answer == run_forced(run.model, example.image, example.question, answer.knobs).answer
