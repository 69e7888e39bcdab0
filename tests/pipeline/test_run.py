"""A whole run on a tiny random model: every step once, resumable, and refusing what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pacevlm.config import (
    CalibrateConfig,
    DataConfig,
    EvaluateConfig,
    LookupConfig,
    ModelConfig,
    ProfileConfig,
)
from pacevlm.data.splits import load_splits
from pacevlm.errors import ConfigError, IdentityError
from pacevlm.evaluation.records import read_records
from pacevlm.evaluation.summary import POLICY_ORDER, read_results
from pacevlm.knobs import Knobs
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.profile import Profile, Sample
from pacevlm.models.elastic import ElasticModel
from pacevlm.pacer import Pacer
from pacevlm.pipeline import STEPS, RunConfig, load_elastic_model, run_pipeline
from pacevlm.pipeline.artefacts import remove_artefacts
from pacevlm.pipeline.run import with_model_folder
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.pipeline.steps import recalibrate
from pacevlm.request.run import run_forced
from pacevlm.training.train_config import GRPOConfig, TrainConfig
from pacevlm.types import StageTimes
from tests.stored_answers import read_answers

ARTEFACTS = {
    *("config.json", "steps.json", "profile.json", "estimator.json", "guardrail_profile.json", "guardrail.json"),
    *("output_length.json", "outcomes.sqlite", "lookup_table.json", "fixed.json", "results.json", "records.jsonl"),
    *("shown.json", "report.html", "pareto.png", "pareto.svg", "knobs.png", "knobs.svg", "bundle/bundle.json"),
    *("controller/controller.json", "controller/controller.safetensors", "train/checkpoint.safetensors"),
    *("train/metrics.jsonl", "train/run.json"),
}


class Recorder:
    """Remembers what a run reports; interrupts it once a piece of work has come so far."""

    def __init__(self, interrupt: tuple[str, int] | None = None) -> None:
        self.events: list[tuple[str, str]] = []
        self.warnings: list[tuple[str, str]] = []
        self.interrupt = interrupt
        self.progressed: set[str] = set()
        self.gone: list[str] = []

    def started(self, step: str) -> None:
        self.events.append(("started", step))

    def missing(self, step: str, names: Sequence[str]) -> None:
        self.events.append(("missing", step))
        self.gone += names

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        self.events.append(("skipped", step))

    def warned(self, step: str, sentence: str) -> None:
        self.warnings.append((step, sentence))

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        self.events.append(("finished", step))

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        self.progressed.add(what)
        if self.interrupt is not None and what == self.interrupt[0] and done >= self.interrupt[1]:
            raise KeyboardInterrupt

    def of(self, kind: str) -> list[str]:
        return [step for event, step in self.events if event == kind]


def make_config(run_dir: Path, model_dir: Path) -> RunConfig:
    return RunConfig(
        run_dir=run_dir,
        model=ModelConfig(path=str(model_dir), max_new_tokens=2, vision_budgets=(1, 1, 2)),
        data=DataConfig(num_train=24, num_val=8, num_test=6),
        profile=ProfileConfig(
            num_requests=6, num_samples=24, repeats=1, max_warmup=1, num_lengths=24, alpha=0.3, max_megapixels=0.02
        ),
        lookup=LookupConfig(num_examples=4),
        train=TrainConfig(
            run_dir=Path("train"), steps=3, batch_size=4, budgets_per_example=2, grpo=GRPOConfig(group_size=3)
        ),
        calibrate=CalibrateConfig(num_requests=8),
        evaluate=EvaluateConfig(budgets=(0.7, 1.0), num_timed=1, num_warmup=0),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("runs") / "run", tiny_elastic_dir)


@pytest.fixture(scope="module")
def first(config: RunConfig) -> Recorder:
    """What the first, uninterrupted run reported."""
    recorder = Recorder()
    run_pipeline(config, reporter=recorder, command="pacevlm quickstart")
    return recorder


@pytest.fixture
def copied(config: RunConfig, first: Recorder, tmp_path: Path) -> RunConfig:
    """A copy of the finished run that may be changed."""
    shutil.copytree(config.run_dir, tmp_path / "run")
    return dataclasses.replace(config, run_dir=tmp_path / "run")


def files_of(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}


def test_a_run_does_every_step_once_and_leaves_its_artefacts(config: RunConfig, first: Recorder) -> None:
    assert first.of("started") == first.of("finished") == list(STEPS)
    assert first.of("skipped") == []
    assert files_of(config.run_dir) >= ARTEFACTS
    assert not [name for name in files_of(config.run_dir) if name.endswith((".tmp", ".partial.jsonl"))]
    assert first.progressed >= {"timed requests", "answers", "training steps", "every configuration", "choices"}


def test_stored_settings_are_those_of_the_run(config: RunConfig, first: Recorder) -> None:
    assert load_run_config(config.run_dir) == config


def test_results_and_records_say_the_same(config: RunConfig, first: Recorder) -> None:
    results, records = read_results(config.run_dir / "results.json"), read_records(config.run_dir / "records.jsonl")
    assert len(records) == len(POLICY_ORDER) * 2 * 6
    assert results["dataset"] == {"name": "digits-crossed", "split": "test", "n": 6}
    assert results["num_timed"] == 1
    full_ms = json.loads((config.run_dir / "steps.json").read_text())["profile"]["facts"]["full_p50_ms"]["e2e"]
    assert [budget["budget_ms"] for budget in results["budgets"]] == pytest.approx([0.7 * full_ms, full_ms])
    oracle = {(r.fraction, r.example_id): r.accuracy for r in records if r.policy == "oracle"}
    assert all(r.accuracy <= oracle[r.fraction, r.example_id] for r in records if r.policy != "full")


def test_training_met_remembered_outcomes(config: RunConfig, first: Recorder) -> None:
    stored = read_answers(config.run_dir / "outcomes.sqlite")
    space, splits = load_elastic_model(config.model).knob_space, load_splits(config.data)
    for example in splits.train[: config.lookup.num_examples]:
        own = {row.knobs for row in stored if row.content == example.content_id}
        assert own == {str(knobs) for knobs in space}
    contents = {row.content for row in stored}
    assert contents <= {example.content_id for example in (*splits.train, *splits.val, *splits.test)}
    assert contents >= {example.content_id for example in splits.test}


def test_a_bundle_answers(config: RunConfig, first: Recorder) -> None:
    pacer = Pacer.from_pretrained(config.run_dir)
    example = load_splits(config.data).test[0]
    assert pacer.num_threads == config.profile.num_threads
    result = pacer.answer(example.image, example.question, budget_ms=10 * pacer.full_p50_ms)
    assert result.knobs in pacer.model.knob_space
    assert result.answer == run_forced(pacer.model, example.image, example.question, result.knobs).answer


def test_a_finished_run_is_not_run_again(copied: RunConfig) -> None:
    before = {name: (copied.run_dir / name).read_bytes() for name in files_of(copied.run_dir)}
    again = Recorder()
    run_pipeline(copied, reporter=again)
    assert again.events == [("skipped", step) for step in STEPS]
    after = {name: (copied.run_dir / name).read_bytes() for name in files_of(copied.run_dir)}
    assert {name for name in after if before.get(name) != after[name]} <= {"config.json"}  # run_dir has moved


def test_other_evaluation_settings_repeat_the_evaluation_alone(copied: RunConfig) -> None:
    changed = dataclasses.replace(copied, evaluate=dataclasses.replace(copied.evaluate, budgets=(0.8,), num_timed=0))
    again = Recorder()
    run_pipeline(changed, reporter=again)
    assert again.of("skipped") == list(STEPS[:4])
    assert again.of("finished") == ["evaluate"]
    assert [b["fraction"] for b in read_results(copied.run_dir / "results.json")["budgets"]] == [0.8]


def test_a_larger_sweep_runs_only_what_is_new(copied: RunConfig) -> None:
    changed = dataclasses.replace(copied, lookup=LookupConfig(num_examples=5))
    again = Recorder()
    run = run_pipeline(changed, "train", reporter=again)
    assert again.events == [
        ("skipped", "profile"),
        ("started", "lookup"),
        ("finished", "lookup"),
        ("skipped", "train"),
    ]
    assert 0 < run.engine.num_run <= len(run.model.knob_space)


def test_settings_that_would_orphan_later_steps_are_refused(copied: RunConfig, tiny_elastic_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.001, now 0\.1.*--fresh"):
        run_pipeline(dataclasses.replace(copied, train=dataclasses.replace(copied.train, lr=0.1)))
    with pytest.raises(ConfigError, match=r"profile\.repeats was 1, now 2"):
        run_pipeline(dataclasses.replace(copied, profile=dataclasses.replace(copied.profile, repeats=2)))
    with pytest.raises(IdentityError, match=r"another model or knob space: model\.identity"):
        run_pipeline(dataclasses.replace(copied, model=dataclasses.replace(copied.model, max_new_tokens=3)))
    assert load_run_config(copied.run_dir).train.lr == 0.001


def test_an_interrupted_run_goes_on_to_the_same_end(config: RunConfig, first: Recorder, copied: RunConfig) -> None:
    # Interrupt the training of a copy that has the same profile, so that both runs learn under the same masks.
    StepLog(copied.run_dir).remove("train", "calibrate", "evaluate")
    for name in ("train", "controller", "bundle"):
        shutil.rmtree(copied.run_dir / name)
    interrupted = Recorder(interrupt=("training steps", 2))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(copied, "train", reporter=interrupted)
    assert interrupted.of("finished") == []
    again = Recorder()
    run_pipeline(copied, "train", reporter=again)
    assert again.of("skipped") == ["profile", "lookup"]
    assert again.of("finished") == ["train"]
    weights = "controller/controller.safetensors"
    assert (copied.run_dir / weights).read_bytes() == (config.run_dir / weights).read_bytes()


def test_an_interrupted_sweep_keeps_its_outcomes(copied: RunConfig) -> None:
    changed = dataclasses.replace(copied, lookup=LookupConfig(num_examples=8))
    before = len(read_answers(copied.run_dir / "outcomes.sqlite"))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(changed, "lookup", reporter=Recorder(interrupt=("answers", 1)))
    assert len(read_answers(copied.run_dir / "outcomes.sqlite")) > before


def test_starting_over_removes_what_the_run_left_and_nothing_else(copied: RunConfig) -> None:
    (copied.run_dir / "notes.txt").write_text("mine")
    (copied.run_dir / "outcomes.sqlite-journal").write_text("a killed writer's")
    changed = dataclasses.replace(copied, profile=dataclasses.replace(copied.profile, seed=1))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(changed, fresh=True, reporter=Recorder(interrupt=("timed requests", 1)))
    assert files_of(copied.run_dir) == {"notes.txt", "config.json", "profile.json.partial.jsonl", ".pacevlm-run.lock"}


def test_starting_over_leaves_a_store_that_others_share(copied: RunConfig) -> None:
    own = copied.run_dir / "outcomes.sqlite"
    shared = own.rename(copied.run_dir.parent / "shared.sqlite")
    before = shared.read_bytes()
    own.symlink_to("../shared.sqlite")
    remove_artefacts(copied)
    assert not os.path.lexists(own)
    assert shared.read_bytes() == before


def test_a_directory_that_is_no_run_is_left_alone(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="nothing was removed"):
        run_pipeline(dataclasses.replace(config, run_dir=tmp_path), fresh=True)
    assert (tmp_path / "train" / "precious").exists()


def test_unknown_steps_are_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="no step 'rest'"):
        run_pipeline(config, "rest")


def test_a_model_is_loaded_as_described(tiny_elastic_dir: Path, tiny_elastic: ElasticModel) -> None:
    plain = load_elastic_model(ModelConfig(path=str(tiny_elastic_dir)))
    assert (plain.identity, plain.knob_space) == (tiny_elastic.identity, tiny_elastic.knob_space)
    other = load_elastic_model(
        ModelConfig(path=str(tiny_elastic_dir), tiers=("low", "high"), top_ks=(2, 4), vision_budgets=(1, 3))
    )
    assert other.knob_space.to_dict() == {"tiers": ["low", "high"], "top_ks": [2, 4], "num_blocks": [3, 4, 5, 6]}
    assert other.vision_budgets == {"low": 1, "high": 3}
    assert other.identity != plain.identity
    with pytest.raises(ConfigError, match="one number for each of the tiers"):
        load_elastic_model(ModelConfig(path=str(tiny_elastic_dir), vision_budgets=(1, 2)))


def test_groups_with_too_few_new_samples_keep_their_bound(config: RunConfig, first: Recorder) -> None:
    guardrail = run_pipeline(config, "profile").pacing("guardrail_profile.json").guardrail
    calibration = Calibration(0.3, {"low": 0.1, "high": 0.2}, 0.5, {"low": 9, "high": 9})
    old = Guardrail(guardrail.estimator, "tier", {"e2e": calibration}, guardrail.picture)
    # 19 requests at the low tier and a single, very late one at the high tier.
    samples = [make_sample(Knobs("low", 2, 3), old, 1.0) for _ in range(19)] + [
        make_sample(Knobs("high", 2, 3), old, 9.0)
    ]
    again = recalibrate(old, samples, alpha=0.3)
    assert again.picture == guardrail.picture  # pictures of all sizes were in the profile alone
    new = again.calibrations["e2e"]
    assert new.factor("low") == pytest.approx(1.0)
    assert new.log_margins["high"] == 0.2
    assert new.factor("medium") == pytest.approx(9.0)  # never seen before or now: the most cautious


def make_sample(knobs: Knobs, guardrail: Guardrail, factor: float) -> Sample:
    """A request that took `factor` times what the estimator predicts, and nothing for its picture."""
    base = Sample(knobs, 1, 20, 8, 900, 1, StageTimes(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, (), 1.0))
    e2e_ms = factor * float(guardrail.estimator.split_samples_ms([base]).rest[0])
    return dataclasses.replace(base, stages=StageTimes(0.0, 0.0, 0.0, 0.0, 0.0, e2e_ms, (), e2e_ms))


def test_an_existing_profile_is_fitted_or_carried_over_but_never_mistaken(copied: RunConfig, tmp_path: Path) -> None:
    source = str(copied.run_dir / "profile.json")

    def profiled(name: str, **changes: Any) -> Path:
        profile = dataclasses.replace(copied.profile, source=source, **changes)
        run_pipeline(dataclasses.replace(copied, run_dir=tmp_path / name, profile=profile), until="profile")
        return tmp_path / name

    same = profiled("same")
    for artefact in ("profile.json", "estimator.json", "guardrail_profile.json"):
        assert (same / artefact).read_bytes() == (copied.run_dir / artefact).read_bytes()
    with pytest.raises(IdentityError, match="threads"):
        profiled("mistaken", num_threads=2)
    moved = profiled("moved", num_threads=2, transfer=True)
    assert LatencyEstimator.load(moved / "estimator.json").device.num_threads == 2
    assert Profile.load(moved / "profile.json").device.num_threads == 2
    with pytest.raises(ConfigError, match="needs source"):
        dataclasses.replace(copied.profile, transfer=True)


def test_a_run_remembers_the_folder_that_a_hub_cache_meant(tiny_elastic_dir: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--allenai--Tiny"
    (cache / "refs").mkdir(parents=True)
    shutil.copytree(tiny_elastic_dir, cache / "snapshots" / "abc")
    (cache / "refs" / "main").write_text("abc")
    given = RunConfig(model=ModelConfig(path=str(cache), max_new_tokens=3))
    found = with_model_folder(given)
    assert found.model == dataclasses.replace(given.model, path=str(cache / "snapshots" / "abc"))
    assert with_model_folder(found) is found
    assert with_model_folder(RunConfig()).model.path == "embedded"
