"""A plan counts what a run's own log and records then show, and starts nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pacevlm.errors import CheckpointError, ConfigError
from pacevlm.evaluation.records import read_records
from pacevlm.latency.calibrate import full_p50_ms
from pacevlm.latency.profile import Profile
from pacevlm.pipeline import STEPS, RunConfig, run_pipeline
from pacevlm.pipeline.context import SilentReporter
from pacevlm.pipeline.plan import PlannedStep, RunPlan, plan_run
from pacevlm.training.metrics_log import read_metrics
from tests.pipeline.test_checks import changed
from tests.pipeline.test_run import files_of, make_config
from tests.stored_answers import read_answers


class Counting(SilentReporter):
    """Counts the answers that are stored when a step begins and when it ends."""

    def __init__(self, run_dir: Path) -> None:
        self.path, self.num_run, self.facts = (
            run_dir / "outcomes.sqlite",
            dict[str, int](),
            dict[str, Mapping[str, Any]](),
        )
        self.before = 0

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        num_stored = len(read_answers(self.path))
        self.num_run[step], self.before, self.facts[step] = num_stored - self.before, num_stored, facts


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> RunConfig:
    config = make_config(tmp_path_factory.mktemp("plans") / "run", tiny_elastic_dir)
    # Answers that are stored before the sweep asks for them, and a price of time.
    return changed(config, lookup__num_examples=9, train__max_price=8.0)


@pytest.fixture(scope="module")
def planned(config: RunConfig) -> RunPlan:
    plan = plan_run(config)
    assert not config.run_dir.exists()
    return plan


@pytest.fixture(scope="module")
def counting(config: RunConfig, planned: RunPlan) -> Counting:
    """What the run itself counted."""
    counting = Counting(config.run_dir)
    run_pipeline(config, reporter=counting)
    return counting


def by_name(plan: RunPlan) -> dict[str, PlannedStep]:
    return {step.name: step for step in plan.steps}


def test_planned_rollouts_are_those_that_ran(planned: RunPlan, counting: Counting) -> None:
    steps = by_name(planned)
    assert list(steps) == list(STEPS)
    for name, num_run in counting.num_run.items():
        figure = steps[name].num_run
        assert num_run <= figure.value
        assert figure.is_most or num_run == figure.value
    assert {name for name in STEPS if not steps[name].num_run.is_most} == {"profile", "lookup", "evaluate"}
    assert counting.num_run["lookup"] > 0
    assert planned.total.num_run.value >= counting.before


def test_planned_requests_are_those_that_were_timed(planned: RunPlan, counting: Counting, config: RunConfig) -> None:
    steps = by_name(planned)
    profile = Profile.load(config.run_dir / "profile.json")
    num_references = len(profile.noise_floor.repeats_ms)
    num_timed = len(profile.samples) + len(profile.picture_samples) + num_references
    assert (steps["profile"].num_timed.value, steps["profile"].num_timed.is_most) == (num_timed, False)
    assert steps["calibrate"].num_timed.value == counting.facts["calibrate"]["num_requests"]
    records = read_records(config.run_dir / "records.jsonl")
    num_timed = sum(record.latency_ms is not None for record in records)
    assert num_timed == counting.facts["evaluate"]["num_timed_requests"]
    # With the default price, three policies at two objectives on one example; whether it is 0 is not known before.
    figure = steps["evaluate"].num_timed
    assert (figure.value, figure.is_most) == (num_timed + 6, True)
    default_price = counting.facts["calibrate"]["default_price"]
    again = by_name(plan_run(config))["evaluate"].num_timed
    assert (again.value, again.is_most) == (num_timed + (6 if default_price else 0), False)
    assert [steps[name].num_timed.value for name in ("lookup", "train")] == [0, 0]


def test_planned_training_is_what_its_metrics_show(planned: RunPlan, counting: Counting, config: RunConfig) -> None:
    metrics = read_metrics(config.run_dir / "train" / "metrics.jsonl")
    train = config.train
    assert by_name(planned)["train"].num_rollouts.value == len(metrics) * train.batch_size * train.grpo.group_size


def test_a_profile_tells_how_long_the_rest_takes(planned: RunPlan, counting: Counting, config: RunConfig) -> None:
    assert planned.latencies is None
    assert [step.seconds for step in planned.steps] == [None] * len(STEPS)
    assert planned.total.seconds is None
    finished = plan_run(config)
    assert all(step.is_done for step in finished.steps)
    assert finished.total.num_run.value == 0
    rate = counting.facts["profile"]["rollouts_per_s"]
    profile = Profile.load(config.run_dir / "profile.json")
    assert (finished.rollouts_per_s, finished.full_ms) == (rate, full_p50_ms(profile))
    lookup = by_name(finished)["lookup"]
    assert lookup.seconds is not None
    assert lookup.seconds.value == pytest.approx(lookup.num_run.value / rate)
    assert not lookup.seconds.is_most
    # Another run's profile does as well, and its rate; alone it says what requests take.
    other = changed(config, profile__source=str(config.run_dir / "profile.json"))
    other = dataclasses.replace(other, run_dir=config.run_dir.parent / "other")
    borrowed = plan_run(other)
    assert borrowed.rollouts_per_s == rate
    assert by_name(borrowed)["profile"].num_timed.value == 0
    assert borrowed.total.seconds is not None
    alone = shutil.copy(config.run_dir / "profile.json", config.run_dir.parent / "alone.json")
    bound = plan_run(changed(other, profile__source=str(alone)))
    mean_s = sum(sample.stages.e2e_ms for sample in profile.samples) / len(profile.samples) / 1000
    seconds = by_name(bound)["lookup"].seconds
    assert seconds is not None
    assert seconds.is_most
    assert seconds.value == pytest.approx(lookup.num_run.value * mean_s)


def test_only_what_is_left_is_planned(counting: Counting, config: RunConfig) -> None:
    before = {name: (config.run_dir / name).read_bytes() for name in files_of(config.run_dir)}
    other = changed(config, evaluate__budgets=(0.9,))
    assert [step.name for step in plan_run(other).steps if not step.is_done] == ["evaluate"]
    assert [step.name for step in plan_run(other, "lookup").steps] == ["profile", "lookup"]
    assert not any(step.is_done for step in plan_run(config, fresh=True).steps)
    assert plan_run(config, fresh=True).latencies is None
    swept = changed(config, lookup__num_examples=10)
    assert [step.name for step in plan_run(swept).steps if not step.is_done] == ["lookup", "calibrate", "evaluate"]
    with pytest.raises(ConfigError, match=r"train\.lr was"):
        plan_run(changed(config, train__lr=0.5))
    with pytest.raises(ConfigError, match="no step 'rest'"):
        plan_run(config, "rest")
    assert {name: (config.run_dir / name).read_bytes() for name in files_of(config.run_dir)} == before


def test_a_plan_needs_no_weights(config: RunConfig, planned: RunPlan, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    moved = dataclasses.replace(changed(config, model__path=str(checkpoint)), run_dir=tmp_path / "run")
    assert plan_run(moved).steps == planned.steps
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="no model directory"):
        plan_run(moved)
    lists = json.loads(json.dumps(planned.space.to_dict()))
    told = changed(moved, **{f"model__{name}": tuple(values) for name, values in lists.items()})
    assert plan_run(told).steps == planned.steps
    assert not (tmp_path / "run").exists()


def test_without_an_oracle_choices_decide_what_runs(config: RunConfig, planned: RunPlan) -> None:
    one = dataclasses.replace(config, run_dir=config.run_dir.parent / "one")
    one = changed(one, evaluate__oracle=False, evaluate__budgets=(0.7,), train__max_price=0.0)
    figure = by_name(plan_run(one))["evaluate"].num_run
    assert figure.is_most
    # Seven policies at one budget, four at no price, and the full configuration.
    assert figure.value == config.data.num_test * 12
