"""A settings file means what the command line means, and what is wrong with it is said in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pacevlm.config import (
    DataConfig,
    ImportanceConfig,
    ModelConfig,
    ProfileConfig,
    config_from_dict,
    config_to_dict,
    flatten_settings,
)
from pacevlm.config_file import MAX_BYTES, read_config_file
from pacevlm.errors import ConfigError
from pacevlm.pipeline.run_config import RunConfig, quickstart_config, read_run_file
from pacevlm.training.train_config import TrainConfig

DEFAULTS = RunConfig()
SETTINGS = dict(flatten_settings(config_to_dict(DEFAULTS)))
TABLES = sorted({name.rpartition(".")[0] for name in SETTINGS} - {""})


def as_toml(values: Mapping[str, Any], where: str = "") -> str:
    """Settings as a TOML file, each in its table."""
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if name not in tables]
    lines += [f"[{where}{name}]\n{as_toml(value, f'{where}{name}.')}" for name, value in tables.items()]
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    return json.dumps("None" if value is None else value, ensure_ascii=False)


def nested(name: str, value: Any) -> dict[str, Any]:
    """One setting by its dotted name, in its tables."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def read(path: Path, text: str | bytes, base: RunConfig = DEFAULTS) -> RunConfig:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_run_file(path).on_top_of(base)


def refused(path: Path, text: str | bytes, base: RunConfig = DEFAULTS) -> str:
    """The sentence that refuses a file; it is one line, of a length that can be read, and names the file."""
    with pytest.raises(ConfigError) as caught:
        read(path, text, base)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 1000
    assert str(path) in sentence
    return sentence


# What a file means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        DEFAULTS,
        quickstart_config(),
        RunConfig(
            Path("a b"),
            model=ModelConfig(
                path="x/é", tiers=("low [1]", "high"), top_ks=(2, 4), vision_budgets=(1, 2), dtype="bfloat16"
            ),
            data=DataConfig("a.jsonl", val_dataset="b.jsonl", test_dataset='"c".jsonl', metric="vqa"),
            profile=ProfileConfig(num_threads=None, alpha=0.5, source="../p.json", transfer=True),
            train=TrainConfig(Path("t"), final_lr=1e-4, mask=False),
        ),
    ],
    ids=["defaults", "quickstart", "other"],
)
def test_all_settings_survive_a_file(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths stay what they are where the file lies in the working directory
    text = as_toml(config_to_dict(config))
    for base in (DEFAULTS, config, quickstart_config(Path("other"))):
        assert read(Path("run.toml"), text, base) == config
        assert read(Path("run.toml"), text.replace("\n", "\r\n"), base) == config
        assert read(Path("run.toml"), b"\xef\xbb\xbf" + text.encode(), base) == config


@pytest.mark.parametrize("name", SETTINGS)
def test_one_setting_changes_no_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = config_to_dict(quickstart_config(Path("mine")))
    for part in name.split("."):
        value = value[part]
    config = read(Path("run.toml"), as_toml(nested(name, value)))
    changed = {**SETTINGS, name: value}
    assert dict(flatten_settings(config_to_dict(config))) == changed


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "[train]\n[data]\n"):
        assert read(tmp_path / "run.toml", text) == DEFAULTS


def test_tables_may_be_written_in_every_way_that_toml_knows(tmp_path: Path) -> None:
    ways = ("[train.grpo]\ngroup_size = 8", "train.grpo.group_size = 8", "[train]\ngrpo = { group_size = 8 }")
    configs = [read(tmp_path / "run.toml", way) for way in ways]
    assert {config.train.grpo.group_size for config in configs} == {8}
    assert configs[0] == configs[1] == configs[2]


def test_relative_paths_start_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_toml(
        {
            "run_dir": "runs/a",
            "model": {"path": "../model"},
            "data": {"dataset": "q.jsonl", "val_dataset": "/v.jsonl"},
            "train": {"run_dir": "t"},
        }
    )
    (tmp_path / "sub").mkdir()
    for where in (tmp_path, tmp_path / "sub"):
        monkeypatch.chdir(where)
        config = read(Path(os.path.relpath(tmp_path / "sub" / "run.toml")), text)
        assert os.path.abspath(config.run_dir) == str(tmp_path / "sub" / "runs" / "a")
        assert os.path.abspath(config.model.path) == str(tmp_path / "model")
        assert os.path.abspath(config.data.dataset) == str(tmp_path / "sub" / "q.jsonl")
        assert (config.data.val_dataset, config.train.run_dir) == ("/v.jsonl", Path("t"))


def test_words_for_what_is_inside_the_package_are_no_paths(tmp_path: Path) -> None:
    base = RunConfig(model=ModelConfig("x"), data=DataConfig("y"))
    config = read(tmp_path / "run.toml", as_toml({"model": {"path": "embedded"}, "data": {"dataset": "digits"}}), base)
    assert (config.model.path, config.data.dataset) == ("embedded", "digits")


def test_a_hub_id_is_no_path_unless_such_a_folder_is_there(tmp_path: Path) -> None:
    path, text = tmp_path / "run.toml", as_toml({"model": {"path": "owner/name"}, "data": {"dataset": "a/b"}})
    config = read(path, text)
    assert (config.model.path, config.data.dataset) == ("owner/name", str(tmp_path / "a" / "b"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert read(path, text).model.path == str(tmp_path / "owner" / "name")


def test_other_settings_have_files_too(tmp_path: Path) -> None:
    path = tmp_path / "importance.toml"
    path.write_text('dataset = "q.jsonl"\nnum_examples = 7\npicture.background = "black"')
    config = read_config_file(path, [("path",), ("dataset",)]).on_top_of(ImportanceConfig(seed=3))
    assert (config.dataset, config.num_examples, config.seed) == (str(tmp_path / "q.jsonl"), 7, 3)
    assert config.picture.background == "black"


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SETTINGS if "_" in name])
def test_the_command_lines_spelling_is_refused_with_the_right_one(name: str, tmp_path: Path) -> None:
    sentence = refused(tmp_path / "run.toml", f"{name.replace('_', '-')} = 1")
    assert f"there is no setting '{name.replace('_', '-')}'; write {name}, with underscores" in sentence


@pytest.mark.parametrize("name", [*SETTINGS, *TABLES])
def test_a_slip_is_refused_with_what_was_meant(name: str, tmp_path: Path) -> None:
    for slip in (name[:-1], f"{name}s", f"{name[:-2]}{name[-1]}{name[-2]}"):
        if len(name.rpartition(".")[2]) > 3 and slip not in {*SETTINGS, *TABLES}:
            assert name in refused(tmp_path / "run.toml", f"{slip} = 1").partition("did you mean")[2]


@pytest.mark.parametrize("name", [name for name in SETTINGS if "." in name])
def test_a_setting_outside_its_table_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    last = name.rpartition(".")[2]
    places = [known for known in SETTINGS if known.rpartition(".")[2] == last]
    if last not in SETTINGS and len(places) <= 3:
        assert name in refused(tmp_path / "run.toml", f"{last} = 1").partition("did you mean")[2]
    assert f"write {name} without quotes" in refused(tmp_path / "run.toml", f'"{name}" = 1')


def test_what_resembles_nothing_is_refused_with_what_is_there(tmp_path: Path) -> None:
    sentence = refused(tmp_path / "run.toml", "[lookup]\nxyzzy = 1")
    assert sentence.endswith("there is no setting 'lookup.xyzzy'; use one of num_examples")


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("value", ["3", '"x"', "[]", "true", "[{ seed = 1 }]", "1979-05-27"])
def test_a_value_for_a_table_is_refused(name: str, value: str, tmp_path: Path) -> None:
    assert f"it must be a table of settings, [{name}]" in refused(tmp_path / "run.toml", f"{name} = {value}")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_table_or_a_date_for_a_value_is_refused(name: str, tmp_path: Path) -> None:
    for value in ("{}", "{ seed = 1 }", "1979-05-27", "[[[]]]"):
        assert f"{name} is " in refused(tmp_path / "run.toml", f"{name} = {value}").replace("[0]", "")


@pytest.mark.parametrize("name", [name for name, value in SETTINGS.items() if isinstance(value, (int, float, bool))])
def test_other_types_are_refused(name: str, tmp_path: Path) -> None:
    wrong = ['"x"', "1.5", "[1]"] if isinstance(SETTINGS[name], int) else ['"0.5"', "true", "[0.5]", f"1{'0' * 400}"]
    for value in [*wrong, "1" if isinstance(SETTINGS[name], bool) else "true"]:
        sentence = refused(tmp_path / "run.toml", f"{name} = {value}")
        assert f"{name} is " in sentence
        assert "; it must be of type " in sentence


@pytest.mark.parametrize("value", ["nan", "-inf", "-1", "-0.5"])
@pytest.mark.parametrize("name", ["profile.alpha", "train.lr", "train.grpo.clip_high", "train.max_budget"])
def test_values_outside_their_range_are_refused_by_the_settings_own_checks(
    name: str, value: str, tmp_path: Path
) -> None:
    assert f"{name} is {float(value)}; it must be a number " in refused(tmp_path / "run.toml", f"{name} = {value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data.seed = -1", "data.seed is -1; it must be a whole number from 0 to"),
        ("train.grpo.group_size = 1", "train.grpo.group_size is 1; it must be"),
        ("model.top_ks = [4, 2]", "model.top_ks (4, 2) must be"),
        ("model.top_ks = [4, 'x']", "model.top_ks[1] is 'x'"),
        ("evaluate.budgets = []", "evaluate.budgets [] must be"),
        ("train.run_dir = 'a/b'", "train.run_dir is 'a/b'; it must be the name of a folder"),
        ("data.val_dataset = 'v.jsonl'", "data.val_dataset is "),
        ("data.dataset = 'None'", "data.dataset is None; it must be of type str"),
        ("data.dataset = ''", "data.dataset is empty"),
        ("run_dir = 3", "run_dir is 3; it must be a path"),
        ("run_dir = '~/x'", "only a shell knows"),
        ('model.path = "a\\u001bb"', "holds a control character"),
        (f"device = '{'x' * 5000}'", "did you mean model.device?"),
        (f"data.seed = '{'x' * 5000}'", "data.seed is 'xxx"),
        (f"{'x' * 5000} = 1", "there is no setting 'xxx"),
        (f"model.tiers = {['low'] * 2000}", "model.tiers ('low', 'low', "),
        (f"model.top_ks = {[4] * 2000}", "model.top_ks (4, 4, "),
        (f"model.vision_budgets = {[0] * 2000}", "model.vision_budgets (0, 0, "),
        (f"evaluate.budgets = {[0.5] * 2000}", "evaluate.budgets [0.5, 0.5, "),
        (f"data.seed{'.a' * 5000} = 1", "nested too deeply"),
        (f"data.seed = {'[' * 5000}", "nested too deeply"),
        (f"data.seed = [{{ a{'.a' * 5000} = 1 }}]", "nested too deeply"),
        (f"data.seed = {'9' * 5000}", "too large"),
        ("a = 1\n\ndata = ", "it is not TOML: Invalid value (at the end, line 3)"),
        ("[data]\nseed = 1\n[data]", "it is not TOML: Cannot declare ('data',) twice (at line 3, "),
        ("data.seed = 1\ndata.seed = 2\n", "it is not TOML: Cannot overwrite a value (at line 2, "),
        ('{"data": {"seed": 1}}', "it is not TOML: Invalid statement (at line 1, "),
        (b"[data]\n# caf\xe9\n", "it is not UTF-8 text (at line 2)"),
        ("[data]\nseed = 1\n".encode("utf-16"), "it is not UTF-8 text (at line 1)"),
        (b"PK\x03\x04", "it is not TOML"),
        ("#" * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_used_is_said(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "run.toml", text)


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "run.toml", "#" * MAX_BYTES) == DEFAULTS


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", Path("/dev/null"), tmp_path / "loop", Path("x\0y")):
        with pytest.raises(ConfigError, match="config"):
            read_run_file(path)
    for name in ("", " ", "~/run.toml", "a\nb", "\udcff"):
        with pytest.raises(ConfigError, match="config is "):
            read_run_file(name)


def test_what_was_read_is_not_changed_by_its_use(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("data.seed = 4")
    file = read_run_file(path)
    assert file.on_top_of(DEFAULTS) == file.on_top_of(DEFAULTS)
    assert config_from_dict(RunConfig, file.values) == file.on_top_of(DEFAULTS)
