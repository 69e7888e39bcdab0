"""A study: what is missing is done, what is there is not done again, and its tables follow from its records."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pacevlm.config import ProfileConfig, StudyConfig
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import ConfigError
from pacevlm.evaluation.worth import StudyRecords, measure_worth
from pacevlm.files import load_safetensors
from pacevlm.knobs import KnobSpace
from pacevlm.pipeline import study
from pacevlm.pipeline.context import SilentReporter
from pacevlm.pipeline.study import run_study
from pacevlm.types import Objective, RequestSizes, RequestView, VisionSizes
from tests.stored_answers import read_answers


@pytest.fixture(scope="module")
def config(tiny_elastic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return StudyConfig(
        study_dir=tmp_path_factory.mktemp("study"),
        model=str(tiny_elastic_dir),
        traffics=("crossed",),
        num_seeds=1,
        num_profiles=1,
        num_train=24,
        num_test=8,
        steps=1,
        batch_size=4,
        num_samples=24,
        repeats=1,
        alpha=0.4,
    )


@pytest.fixture(scope="module")
def worth(config: StudyConfig) -> dict[str, Any]:
    return run_study(config)


def test_tables_are_made_from_records_alone(config: StudyConfig, worth: dict[str, Any]) -> None:
    assert json.loads((config.study_dir / "worth.json").read_text()) == worth
    records = StudyRecords.load(config.study_dir / "crossed/measured0/records.safetensors")
    assert records is not None
    assert {"commit": worth["crossed"]["commit"], **measure_worth([records])} == worth["crossed"]
    expected = {"lookup_table", "fixed", "full", "cheapest", "random", "oracle", "task_table", "predictor"}
    expected |= {"predictor_of_sizes", "predictor_tier", "predictor_top_k", "predictor_num_blocks"}
    assert set(records.policies) == {*expected, "controller 0"}
    assert records.accuracy.shape == (13, 5, 8)
    # No policy is above the oracle, which knows every answer.
    assert (records.accuracy.sum(axis=2) <= records.accuracy[records.of("oracle")].sum(axis=1) + 1e-9).all()


def test_what_is_there_is_not_done_again(
    config: StudyConfig, worth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(study, "run_pipeline", fail)
    assert run_study(config) == worth
    (config.study_dir / "crossed/measured0/records.safetensors").unlink()
    with pytest.raises(AssertionError, match="done again"):
        run_study(config)
    monkeypatch.undo()
    assert run_study(config) == worth  # from the trained controller and the outcomes that are there


def test_all_runs_share_what_the_model_answered(config: StudyConfig, worth: dict[str, Any]) -> None:
    store, own = (
        config.study_dir / "crossed/outcomes.sqlite",
        config.study_dir / "crossed/measured0/seed0/outcomes.sqlite",
    )
    assert os.path.samefile(store, own)
    assert own.is_symlink()
    assert len(read_answers(own)) >= 24 * 36


def test_a_profile_that_lies_there_is_taken(config: StudyConfig, worth: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "crossed/profiles").mkdir(parents=True)
    given = (config.study_dir / "crossed/profiles/measured0.json").read_bytes()
    (tmp_path / "crossed/profiles/reference.json").write_bytes(given)
    found = run_study(StudyConfig(**{**vars(config), "study_dir": tmp_path}))
    assert found["crossed"]["profiles"] == ["reference"]
    # The same questions, profile and seed: the same tables.
    named = dict.fromkeys(("commit", "profiles", "profile_gains", "predictor_gains"))
    assert found["crossed"] | named == worth["crossed"] | named


def test_given_profiles_come_first_whatever_their_names(
    config: StudyConfig, worth: dict[str, Any], tmp_path: Path
) -> None:
    given = (config.study_dir / "crossed/profiles/measured0.json").read_bytes()
    (tmp_path / "crossed/profiles").mkdir(parents=True)
    for name in ("zebra", "measured-at-night"):
        (tmp_path / f"crossed/profiles/{name}.json").write_bytes(given)
    names = ["measured-at-night", "zebra", "measured0"]
    for num_profiles, expected in ((1, names[:1]), (3, names), (2, names[:2])):
        changed = dataclasses.replace(config, study_dir=tmp_path, num_profiles=num_profiles)
        found = study._Traffic(changed, "crossed", study.SilentReporter()).profiles()
        assert [path.stem for path in found] == expected


def test_a_study_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="traffics names nothing"):
        StudyConfig(traffics=())
    with pytest.raises(ConfigError, match="mixture is 'sideways'"):
        StudyConfig(traffics=("sideways",))
    with pytest.raises(ConfigError, match="num_seeds"):
        StudyConfig(num_seeds=0)


def test_a_controller_that_is_blind_to_something_learns_without_it(config: StudyConfig, worth: dict[str, Any]) -> None:
    """Its weights for that stay 0, and the settings of a run that sees everything are what they were."""
    runs = study._Traffic(config, "crossed", SilentReporter())
    profile = config.study_dir / "crossed/profiles/measured0.json"
    folder = runs.train(profile, 0, "blind-", blind_to=("question", "latency_token"))
    weights = load_safetensors(folder / "controller/controller.safetensors")
    unseen = {name for name, tensor in weights.items() if name.endswith("weight") and not tensor.any()}
    assert unseen == {"stage1.question.weight", "stage2.output.weight"}
    seeing = json.dumps(runs.run_config(folder, ProfileConfig()).train.identity())
    assert "blind_to" not in seeing
    assert "baseline" not in seeing
    with pytest.raises(ConfigError, match="blind_to"):
        runs.train(profile, 0, "blind-", blind_to=("answer",))


def test_an_unknown_ablation_is_refused_before_anything_runs(config: StudyConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(config, study_dir=tmp_path / "study", ablations=("no-mask", "no-luck"))
    with pytest.raises(ConfigError, match="no ablation no-luck; use some of no-mask, "):
        run_study(wrong)
    assert not wrong.study_dir.exists()


def test_one_knob_alone_never_moves_the_others() -> None:
    space = KnobSpace(("low", "high"), (4, 8), (12, 14, 16))
    masks = {knob: study._one_knob_mask(knob, space) for knob in ("tier", "top_k", "num_blocks")}
    assert {knob: int(mask.sum()) for knob, mask in masks.items()} == {"tier": 2, "top_k": 2, "num_blocks": 3}
    assert np.logical_and.reduce(list(masks.values())).nonzero() == ([1], [1], [2])  # full alone is in all
    for mask in masks.values():
        flat = mask.reshape(-1)
        assert flat[space.index(space.full)]
        assert not flat[space.index(space.cheapest)]


def test_where_no_admitted_configuration_is_left_the_cheapest_runs() -> None:
    feasible = np.zeros((2, 2, 3), dtype=bool)
    feasible[1, 0, 2] = True
    view = RequestView(torch.zeros(4), RequestSizes((VisionSizes(1, 144),) * 2, 9, 8000), (100, 80), None)
    request = PolicyInput(view, Objective(50.0), np.full(feasible.shape, 40.0), feasible, True)
    kept = study._with_mask(request, np.ones(feasible.shape, dtype=bool))
    assert kept.any_feasible
    np.testing.assert_array_equal(kept.feasible, feasible)
    nothing = study._with_mask(request, ~feasible)
    assert not nothing.any_feasible
    assert nothing.feasible.reshape(-1).nonzero()[0].tolist() == [0]
    assert feasible.sum() == 1  # the request's own mask stays
