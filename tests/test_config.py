"""Settings survive JSON, and what is wrong with them is said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pacevlm.config import (
    CalibrateConfig,
    ControllerSettings,
    DataConfig,
    EvaluateConfig,
    ImportanceConfig,
    LookupConfig,
    ModelConfig,
    ProfileConfig,
    changed_settings,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)
from pacevlm.errors import ConfigError
from pacevlm.pipeline import RunConfig, quickstart_config
from pacevlm.training.train_config import GRPOConfig, TrainConfig

SECTIONS = (
    ModelConfig(top_ks=(2, 4), vision_budgets=(1, 2, 3), dtype="bfloat16", device="cuda:1"),
    DataConfig(dataset="a.jsonl", test_dataset="b.jsonl", num_train=7),
    ProfileConfig(num_threads=None, alpha=0.1, group_by="knobs"),
    LookupConfig(num_examples=3),
    ControllerSettings(thumbnail=True),
    CalibrateConfig(num_requests=50),
    EvaluateConfig(budgets=(0.25, 1), oracle=False),
    ImportanceConfig(path="x"),
)


@pytest.mark.parametrize("config", SECTIONS, ids=lambda config: type(config).__name__)
def test_settings_survive_json(config: Any) -> None:
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(type(config), values) == config


def test_a_whole_run_survives_its_file(tmp_path: Path) -> None:
    train = TrainConfig(run_dir=Path("t"), lr=1e-4, grpo=GRPOConfig(group_size=4, beta=0.1))
    for config in (quickstart_config(tmp_path), RunConfig(tmp_path / "a", model=SECTIONS[0], train=train)):  # type: ignore[arg-type]
        save_config(tmp_path / "config.json", config)
        assert load_config(tmp_path / "config.json", RunConfig) == config


def test_what_is_stored_is_resolved() -> None:
    values = config_to_dict(quickstart_config())
    assert values["train"]["grpo"]["clip_high"] == GRPOConfig().clip_high
    assert values["evaluate"]["budgets"] == list(quickstart_config().evaluate.budgets)


def test_settings_left_out_keep_their_defaults() -> None:
    assert config_from_dict(RunConfig, {"data": {"seed": 3}}) == RunConfig(data=DataConfig(seed=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"\['modle'\] are unknown; allowed are .*'model'"),
        ({"model": {"paht": "x"}}, r"model: \['paht'\] are unknown"),
        ({"train": {"run_dir": "t", "grpo": {"group": 4}}}, r"train.grpo: \['group'\] are unknown"),
        ({"train": {"steps": 4}}, r"train: \['run_dir'\] are missing"),
        ({"model": 3}, "model: 3 is no mapping"),
        ({"data": {"seed": "0"}}, "data.seed is '0'; it must be of type int"),
        ({"data": {"seed": True}}, "data.seed is True; it must be of type int"),
        ({"evaluate": {"oracle": 1}}, "evaluate.oracle is 1; it must be of type bool"),
        ({"evaluate": {"budgets": 0.5}}, "evaluate.budgets is 0.5; it must be a list"),
        ({"evaluate": {"budgets": [0.5, "1"]}}, r"evaluate.budgets\[1\] is '1'; it must be of type float"),
        ({"model": {"dtype": "int8"}}, "model.dtype is 'int8'; use one of float32, bfloat16, float16"),
        ({"profile": {"num_threads": "all"}}, "profile.num_threads is 'all'; it must be of type int"),
    ],
)
def test_wrong_settings_are_named(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(RunConfig, values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path / "config.json", RunConfig)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"path": ""}, "path is empty"),
        (ModelConfig, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (ModelConfig, {"stage2_after": 0}, "stage2_after is 0"),
        (DataConfig, {"num_train": 0}, "num_train is 0"),
        (DataConfig, {"test_dataset": "b.jsonl"}, "test split of its own"),
        (ProfileConfig, {"alpha": 1.0}, "alpha is 1.0"),
        (ProfileConfig, {"num_threads": 0}, "num_threads is 0"),
        (ProfileConfig, {"max_megapixels": 0.0}, "max_megapixels is 0.0"),
        (ProfileConfig, {"max_megapixels": float("nan")}, "max_megapixels is nan"),
        (LookupConfig, {"num_examples": 1}, "num_examples is 1"),
        (CalibrateConfig, {"num_requests": 1}, "num_requests is 1"),
        (EvaluateConfig, {"budgets": ()}, "strictly increasing"),
        (EvaluateConfig, {"budgets": (0.5, 0.5)}, "strictly increasing"),
        (EvaluateConfig, {"budgets": (0.5, float("inf"))}, "strictly increasing"),
        (EvaluateConfig, {"num_timed": -1}, "num_timed is -1"),
        (ImportanceConfig, {"num_candidates": 0}, "num_candidates is 0"),
        (RunConfig, {"train": TrainConfig(run_dir=Path(".."))}, "must be the name of a folder"),
        (RunConfig, {"train": TrainConfig(run_dir=Path("a/b"))}, "must be the name of a folder"),
        (RunConfig, {"train": TrainConfig(run_dir=Path("/"))}, "must be the name of a folder"),
        (RunConfig, {"train": TrainConfig(run_dir=Path("."))}, "must be the name of a folder"),
    ],
)
def test_values_outside_their_range_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(tmp_path / "config.json", RunConfig)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(tmp_path / "config.json", RunConfig)


def test_changes_are_named_with_both_values() -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"b": 2, "c": [1, 2]}, "e": 5}
    assert changed_settings(old, new) == ["a.b was 1, now 2", "d was 0, now None", "e was None, now 5"]
    assert changed_settings(old, old) == []
