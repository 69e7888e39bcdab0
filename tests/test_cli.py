"""The command line: help, errors and exit codes, and every command once on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from pacevlm import cli, options
from pacevlm.cli import COMMANDS, main
from pacevlm.console import RichReporter, print_answer
from pacevlm.errors import DataError
from pacevlm.pacer import read_prices
from pacevlm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> int:
    """The exit code, wherever it comes from."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def tiny_arguments(run_dir: Path, model_dir: Path) -> list[str]:
    settings = {
        "run-dir": run_dir,
        "model.path": model_dir,
        "model.max-new-tokens": 2,
        "model.vision-budgets": "1 1 2",
        "data.num-train": 24,
        "data.num-val": 8,
        "data.num-test": 4,
        "profile.num-requests": 4,
        "profile.num-samples": 16,
        "profile.repeats": 1,
        "profile.max-warmup": 1,
        "profile.num-lengths": 24,
        "profile.max-megapixels": 0.02,
        "profile.alpha": 0.3,
        "lookup.num-examples": 2,
        "train.steps": 1,
        "train.batch-size": 4,
        "train.grpo.group-size": 2,
        "calibrate.num-requests": 6,
        "evaluate.budgets": "0.8 1.2",
        "evaluate.num-timed": 1,
        "evaluate.num-warmup": 0,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", *str(value).split(" "))]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> Path:
    """A run made by the quickstart command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert run("quickstart", *tiny_arguments(folder, tiny_elastic_dir)) == 0
    return folder


# Help and errors -----------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert "pacevlm quickstart" in text
    assert run() == 2
    assert run("--version") == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: pacevlm {name}" in text
    assert "default:" in text
    assert f"\n  pacevlm {name}" in text.split("Examples:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_options_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps.json").write_text("{}")  # or evaluate would say first that there is no run
    needs = {"answer": ["image.png", "Which?", "--budget-ms", "5"], "rebase": ["runs/old"], "inspect": ["x"]}
    needed = needs.get(name, [])
    where = [] if name in ("importance", "inspect", "sample") else ["--run-dir", str(tmp_path)]
    assert run(name, *needed, *where, "--no-such-option", "3") == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_the_folder_one_stands_in_can_be_rebased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "/"):
        assert run("rebase", name) == 2
        assert "settings of a run" in capsys.readouterr().err


def test_values_outside_their_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--run-dir", tmp_path, "--profile.alpha", "2") == 2
    assert "alpha is 2.0" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert run("train", "--run-dir", tmp_path, "--train.steps", "many") == 2
    assert not list(tmp_path.iterdir())


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("learn") == 2
    assert "no command 'learn'; use one of quickstart" in capsys.readouterr().err


def test_an_error_is_one_line_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "--run-dir", tmp_path / "run", "--model.path", tmp_path / "nothing") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("pacevlm: error: there is no model directory")
    assert captured.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json"):
        main(["report", "--run-dir", str(tmp_path), "--debug"])


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "train", interrupted)
    assert run("train") == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err


def test_an_evaluation_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--run-dir", tmp_path) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err


def test_starting_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, pacevlm.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run-dir", "a"], Path("a")),
        (["--train.steps", "3", "--run-dir=a/b"], Path("a/b")),
        (["--run_dir", "a"], Path("a")),
        (["--run-dir"], None),
        (["--train.run-dir", "t"], None),
    ],
)
def test_the_run_directory_is_read_first(arguments: list[str], expected: Path | None) -> None:
    assert options.given_run_dir(arguments) == expected


# Settings ------------------------------------------------------------------------------------------------------------

# What every kind of setting is tried with, and the settings that allow other values only.
BY_KIND: dict[Any, list[str]] = {
    bool: ["", "no-"],
    int: ["4", "8"],
    float: ["0.5", "0.9"],
    str: ["a b", "x[red]é"],
    Path: ["sub"],
    tuple[str, ...]: ["low mid high", "a [b] c"],
    tuple[int, ...]: ["4 8 9", "2"],
    tuple[float, ...]: ["0.5 0.9", "1"],
}
BY_NAME: dict[str, list[str]] = {
    "model.vision-budgets": ["1 2 3"],
    "model.block-order": ["importance", "early_exit", "docvqa-2.b"],
    "data.fields": ["image=img question=q", "answer=a b=c"],
    "data.mixture": ["crossed", "detail=1,thought=0.5"],
    "train.blind-to": ["question", "latency_token question"],
    "train.batch-size": ["8", "16"],  # multiples of any train.budgets-per-example
    "train.max-tightening": ["1", "1.5"],
    "train.min-budget": ["0.2"],
    "train.max-budget": ["2"],
    "train.min-price": ["0.5"],
    "train.max-price": ["9", "0"],
    "picture.background": ["white", "#102030"],
}
NEEDED = {
    **{f"data.{part}-dataset": ["--data.dataset", "a.jsonl"] for part in ("val", "test")},
    "data.fields": ["--data.dataset", "a.jsonl"],
    "profile.transfer": ["--profile.source", "p.json"],
}


def settings_of(kind: type, prefix: str = "") -> dict[str, list[list[str]]]:
    """Words of a command line for every setting of a configuration, several ways for each."""
    found: dict[str, list[list[str]]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        path = f"{prefix}{name}".replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found |= settings_of(hint, f"{path}.")  # type: ignore[arg-type]
            continue
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        optional = type(None) in typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            values = list(choices)
        elif choices and typing.get_origin(choices[0]) is typing.Literal:
            values = list(typing.get_args(choices[0]))
        else:
            values = BY_KIND[choices[0] if optional else hint]
        values = [*BY_NAME.get(path, values), *(["None"] if optional else [])]
        before = NEEDED.get(path, [])
        if hint is bool:
            head, _, last = path.rpartition(".")
            found[path] = [[*before, f"--{head}{'.' if head else ''}{no}{last}"] for no in values]
        elif (choices and typing.get_origin(choices[0]) is tuple) or typing.get_origin(hint) is tuple:
            found[path] = [[*before, f"--{path}", *value.split(" ")] for value in values]
        else:
            found[path] = [[*before, f"--{path}", value] for value in values]
    return {path: ways for path, ways in found.items() if path != "run-dir"}


def read_settings(*arguments: str) -> Any:
    from pacevlm.pipeline import RunConfig

    config, fresh, plan = cli._read_settings("train", arguments, Path("runs/default"), RunConfig)
    assert not fresh
    assert not plan
    return config


def write_toml(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def with_whole_paths(config: Any) -> Any:
    """The same settings with every path written out, as a run directory stores them."""
    from pacevlm.config import WITHIN_PACKAGE
    from pacevlm.pipeline.run_config import _PATHS

    for part, name in _PATHS:
        section = getattr(config, part)
        path = getattr(section, name)
        if path is not None and path not in WITHIN_PACKAGE:
            section = dataclasses.replace(section, **{name: os.path.abspath(path)})
            config = dataclasses.replace(config, **{part: section})
    return config


def test_the_same_command_means_the_same_at_every_start_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pacevlm.config import config_to_dict, flatten_settings
    from pacevlm.pipeline import RunConfig
    from pacevlm.pipeline.run_config import save_run_config

    monkeypatch.chdir(tmp_path)
    settings = settings_of(RunConfig)
    assert len(settings) > 60
    rng = random.Random(0)
    needed = {words[0] for words in NEEDED.values()}
    commands = [[words for ways in settings.values() for words in (ways[turn % len(ways)],)] for turn in range(4)]
    commands += [
        [rng.choice(ways) for ways in rng.sample(list(settings.values()), rng.randint(1, 30))] for _ in range(16)
    ]
    # Files are asked as they are: a mixture goes with the embedded questions only.
    commands = [
        [part for part in command if part[0] != "--data.mixture" or not any("--data.dataset" in it for it in command)]
        for command in commands
    ]
    commands += [[part] for part in settings["data.mixture"]]
    for number, command in enumerate(commands):
        # Parts that bring another setting along come last, so that theirs is the value that counts.
        words = [word for part in sorted(command, key=lambda part: part[0] in needed) for word in part]
        arguments = ["--run-dir", str(tmp_path / str(number)), *words]
        first = read_settings(*arguments)
        values = {name: "None" if value is None else value for name, value in flatten_settings(config_to_dict(first))}
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
        assert read_settings("--config", write_toml(Path("run.toml"), "\n".join(lines))) == first, arguments
        save_run_config(first)
        assert with_whole_paths(read_settings(*arguments)) == with_whole_paths(first), arguments
        assert with_whole_paths(read_settings("--run-dir", str(first.run_dir))) == with_whole_paths(first)


def test_both_spellings_of_every_switch_are_there_at_every_start(tmp_path: Path) -> None:
    from pacevlm.config import config_to_dict, flatten_settings
    from pacevlm.pipeline import RunConfig
    from pacevlm.pipeline.run_config import save_run_config

    switches = {path: ways for path, ways in settings_of(RunConfig).items() if "no-" in ways[-1][-1]}
    assert "evaluate.track-drift" in switches
    where = ["--run-dir", str(tmp_path)]
    for spelling in (1, 0, 1, 0):
        config = read_settings(*where, *[word for ways in switches.values() for word in ways[spelling]])
        values = dict(flatten_settings(config_to_dict(config)))
        assert {values[path.replace("-", "_")] for path in switches} == {spelling == 0}
        save_run_config(config)
    assert "--evaluate.no-track-drift" in switches["evaluate.track-drift"][1]


def test_the_last_run_directory_counts(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert options.given_run_dir(["--run-dir", one, f"--run-dir={two}"]) == Path(two)
    assert read_settings("--run-dir", one, f"--run-dir={two}").run_dir == Path(two)


def test_wrong_settings_are_refused_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pacevlm.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (
        ["train", "--profile.alpha", "2"],
        ["quickstart", "--nothing"],
        ["evaluate", "--run-dir", "x\ny"],
        ["profile", "--model.path", "missing"],
        ["importance", "--path", "missing"],
        ["train", "--config", "missing.toml"],
        ["report", "--config", "missing.toml"],
        ["answer", "missing.png", "Which?", "--budget-ms", "5"],
    ):
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
        assert done.stdout.strip() == "2 []"
        assert done.stderr


# A settings file -----------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_what_is_stored(tmp_path: Path) -> None:
    from pacevlm.pipeline.run_config import save_run_config

    where, path = ["--run-dir", str(tmp_path / "run")], tmp_path / "run.toml"
    first = read_settings(*where, "--train.steps", "2", "--data.seed", "2", "--lookup.num-examples", "2")
    save_run_config(first)
    arguments = [*where, "--config", write_toml(path, "train.steps = 3\ndata.seed = 3\n")]
    for words in ([*arguments, "--data.seed", "4"], ["--data.seed=4", f"--config={path}", *where]):
        config = read_settings(*words)
        assert (config.train.steps, config.data.seed, config.lookup.num_examples) == (3, 4, 2)
        assert config.train.batch_size == 256  # nobody names it
    save_run_config(config)
    assert read_settings(*where) == with_whole_paths(config)


def test_a_file_may_name_the_run_directory_whose_settings_count(tmp_path: Path) -> None:
    from pacevlm.pipeline.run_config import save_run_config

    save_run_config(read_settings("--run-dir", str(tmp_path / "one"), "--data.seed", "5"))
    file = ["--config", write_toml(tmp_path / "run.toml", 'run_dir = "one"\ntrain.steps = 3')]
    config = read_settings(*file)
    assert (config.run_dir, config.data.seed, config.train.steps) == (tmp_path / "one", 5, 3)
    other = read_settings("--run-dir", str(tmp_path / "two"), *file)
    assert (other.run_dir, other.data.seed, other.train.steps) == (tmp_path / "two", 0, 3)


WITH_FILE = ("quickstart", "profile", "train", "evaluate", "report", "importance")


@pytest.mark.parametrize("name", WITH_FILE)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\npath = 'x'", "there is no setting 'modle'"),
        ("seed = ", "it is not TOML"),
        ("picture.background = 3", "picture.background is 3; it must be of type str"),
        ("picture.max_pixels = 0", "picture.max_pixels is 0; it must be a whole number from 1"),
        ("picture.max-pixels = 1", "write picture.max_pixels, with underscores"),
        (None, "there is no config file at"),
    ],
)
def test_a_wrong_settings_file_ends_every_command_that_reads_one(
    name: str,
    text: str | None,
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        write_toml(tmp_path / "run.toml", text)
    before = sorted(tmp_path.iterdir())
    # A report reads the run first.
    where = [] if name == "importance" else ["--run-dir", run_dir if name == "report" else tmp_path / "run"]
    capsys.readouterr()
    assert run(name, *where, "--config", tmp_path / "run.toml") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert str(tmp_path / "run.toml") in line
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_settings_file_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(tmp_path / "run.toml", "")
    for name in WITH_FILE:
        assert run(name, "--config", path, f"--config={path}") == 2
        assert "--config is given 2 times; put all settings into one file" in capsys.readouterr().err
        assert run(name, "--config") == 2
        assert "--config" in capsys.readouterr().err


# Output --------------------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;t\x07no\r\npacevlm: error: forged\u202e\u2028\x9b\udcff[bold]x[/red]"


def start(*arguments: str | bytes, **changes: Any) -> subprocess.CompletedProcess[bytes]:
    """One command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes.pop("env", {})}
    words = [argument.encode() if isinstance(argument, str) else argument for argument in arguments]
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | changes
    command = [sys.executable.encode(), b"-m", b"pacevlm", *words]
    return subprocess.run(command, env=environment, timeout=60, check=False, **settings)


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE],
        ["train", HOSTILE],
        ["train", f"--{HOSTILE}", "3"],
        ["train", "--train.steps", HOSTILE],
        ["train", "--profile.group-by", HOSTILE],
        ["train", "--run-dir", HOSTILE],
        ["train", "--run-dir", "\u202egnp", "--help"],
        ["train", "--model.path", HOSTILE],
        ["report", "--run-dir", HOSTILE],
        ["evaluate", "--run-dir", HOSTILE],
        ["answer", HOSTILE, "Which?", "--budget-ms", "5"],
        ["answer", "x.png", "Which?", "--budget-ms", HOSTILE],
        ["importance", "--path", HOSTILE],
        ["train", "--config", HOSTILE],
        ["sample", HOSTILE],
        ["sample", f"{HOSTILE}.png"],
        ["importance", "--dataset", HOSTILE],
    ],
    ids=lambda arguments: " ".join(arguments)[:25].replace("\x1b", ""),
)
def test_arguments_cannot_command_the_terminal_or_forge_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert captured.err
    assert not {character for character in text if not character.isprintable()} - {"\n"}
    assert not [line for line in text.splitlines() if line.startswith("pacevlm: error: forged")]


def test_what_models_and_data_sets_say_cannot_either(capsys: pytest.CaptureFixture[str]) -> None:
    from pacevlm.knobs import Knobs
    from pacevlm.types import Answer, RequestSizes, StageTimes, VisionSizes

    times = StageTimes(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, (), 1.0)
    vision = VisionSizes(1, 20)
    sizes, knobs = RequestSizes((vision,), 12, 900, HOSTILE), Knobs(HOSTILE, 2, 3)
    answer = Answer(
        HOSTILE, (7,), knobs, sizes, vision, times, feasible=False, predicted_ms=1.0, why_infeasible=HOSTILE
    )
    print_answer(answer)
    with RichReporter() as reporter:
        reporter.started(HOSTILE)
        reporter.warned("lookup", HOSTILE)
        reporter.finished("calibrate", 1.0, {"num_requests": 3, "factors": {HOSTILE: 1.0}, "default_price": 2.0})
        reporter.progress(HOSTILE, 1, 2, HOSTILE)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert not {character for character in text if not character.isprintable()} - {"\n"}
        assert "[bold]x[/red]" in text.replace("\n", "")
        assert not [line for line in text.splitlines() if line.startswith("pacevlm: error")]
    print_answer(answer, as_json=True)
    line = capsys.readouterr().out
    assert line.isascii()
    assert len(line.splitlines()) == 1
    values = json.loads(line, parse_constant=pytest.fail)
    assert (values["answer"], values["upper_bound_ms"], values["budget_ms"]) == (HOSTILE, None, None)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_needs_no_encoding(encoding: str) -> None:
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    for arguments in (["train", "--help"], ["lerne-日本語"], ["train", "--größe", "🙂"], [b"caf\xe9"]):
        done = start(*arguments, env=environment)  # type: ignore[arg-type]
        assert done.returncode == (0 if "--help" in arguments else 2)
        assert b"Traceback" not in done.stdout + done.stderr
        (done.stdout + done.stderr).decode(encoding)


def test_help_is_laid_out_however_wide_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("1", "2", "7", "0", "x", "100000"):
        monkeypatch.setenv("COLUMNS", columns)
        assert run("evaluate", "--help") == 0
        assert run("train", "--train.steps", "many") == 2
        captured = capsys.readouterr()
        assert "pacevlm" in captured.out
        assert captured.err
        assert os.environ["COLUMNS"] == columns


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_said() -> None:
    with open("/dev/full", "wb") as full:
        done = start("train", "--help", stdout=full)
        assert done.returncode == 2
        assert b"the output cannot be read or written: No space left on device" in done.stderr
        assert b"Traceback" not in done.stderr
        assert start("learn", stdout=full, stderr=full).returncode == 2


def test_closed_streams_are_no_fault() -> None:
    program = "import sys; from pacevlm.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, code in ((["--help"], 0), (["train", "--help"], 0), (["train", "--nothing"], 2)):
        command = shlex.join([sys.executable, "-c", program, *arguments])
        for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
            done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, env=environment, timeout=60)
            assert done.returncode == code
            assert b"Traceback" not in done.stdout + done.stderr


def test_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors
    assert run("learn") == 2
    assert (sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors) == before


def test_a_fault_of_ours_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(arguments: Any) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setitem(COMMANDS, "train", faulty)
    assert run("train") == cli.FAULT == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pacevlm: error: a fault of pacevlm itself, RuntimeError: ")
    assert line.endswith("run again with --debug to see where")
    with pytest.raises(RuntimeError):
        main(["train", "--debug"])


def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(arguments: Any) -> None:
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

    monkeypatch.setitem(COMMANDS, "report", faulty)
    assert run("report") == 2
    assert "jinja2 is not installed" in capsys.readouterr().err


# Commands ------------------------------------------------------------------------------------------------------------


def test_quickstart_ends_with_a_report(run_dir: Path) -> None:
    report = (run_dir / "report.html").read_text()
    assert "pacevlm quickstart --run-dir" in report
    config = json.loads((run_dir / "config.json").read_text())
    assert config["train"]["grpo"]["group_size"] == 2
    assert config["model"]["vision_budgets"] == [1, 1, 2]


def test_a_second_start_skips_what_is_done_and_remembers_its_settings(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quickstart", "--run-dir", run_dir) == 0
    captured = capsys.readouterr()
    for step in ("profile", "lookup", "train", "calibrate", "evaluate"):
        assert f"{step} is done already" in captured.err
    for text in ("lookup_table", "oracle", "sample question", "budget met", f"report: {run_dir / 'report.html'}"):
        assert text in captured.out


def test_other_training_settings_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--run-dir", run_dir, "--train.steps", "2") == 2
    error = capsys.readouterr().err
    assert "train.steps was 1, now 2" in error
    assert "--fresh" in error


def test_evaluate_and_report_print_the_table(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--run-dir", run_dir) == 0
    table = capsys.readouterr().out
    assert "controller" in table
    (run_dir / "pareto.png").unlink()
    (run_dir / "report.html").unlink()
    assert run("report", "--run-dir", run_dir) == 0
    assert capsys.readouterr().out == table
    assert (run_dir / "pareto.png").exists()
    assert (run_dir / "report.html").exists()


def test_headroom_is_measured_stored_and_shown_by_the_next_report(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pacevlm.evaluation.headroom_summary import headroom_sentence, read_headroom

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    words = ["headroom", "--run-dir", copy, "--num-examples", "10", "--num-moved", "3", "--margin", "1.2"]
    assert run(*words) == 0
    results = read_headroom(copy / "headroom.json")
    sentence = headroom_sentence(results)
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert (results["num_examples"], results["moved"]["num_examples"]) == (10, 3)
    assert [budget["fraction"] for budget in results["budgets"]] == [0.8, 1.2]
    assert set(results["models"]) == {"stage1", "both_stages"}
    # Outcomes are kept, of moved pictures too, and nothing depends on what was known.
    known = (copy / "outcomes.sqlite").read_bytes()
    assert run(*words) == 0
    assert read_headroom(copy / "headroom.json") == results
    assert (copy / "outcomes.sqlite").read_bytes() == known
    assert run("report", "--run-dir", copy) == 0
    assert sentence[:40] in (copy / "report.html").read_text()


def test_headroom_needs_a_profile_enough_pictures_and_its_library(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("headroom", "--run-dir", tmp_path) == 2
    assert "settings of a run" in capsys.readouterr().err
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert run("headroom", "--run-dir", copy, "--num-examples", "4") == 2
    assert "num_examples is 4; it must be a whole number from 5" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )
    (copy / "steps.json").unlink()
    assert run("headroom", "--run-dir", copy) == 2
    assert "holds no finished profile; run `pacevlm profile" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("headroom", "--run-dir", copy) == 2
    assert "sklearn is not installed; pip install 'pacevlm[" in capsys.readouterr().err.replace("import of ", "")


def test_a_run_made_with_a_settings_file_goes_on_with_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "run.toml"
    text = f'run_dir = "{os.path.relpath(run_dir, path.parent)}"\n[evaluate]\nnum_timed = 1\n'
    write_toml(path, text)
    assert run("evaluate", "--config", path) == 0
    captured = capsys.readouterr()
    assert "evaluate is done already" in captured.err
    assert run("report", "--config", path) == 0
    assert capsys.readouterr().out == captured.out
    write_toml(path, f"{text}[train]\nsteps = 2\n")
    assert run("train", "--config", path) == 2
    assert "train.steps was 1, now 2" in capsys.readouterr().err


def test_answer_prints_text_or_json(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(image)
    arguments = ["answer", image, "Which digit is red?", "--run-dir", run_dir]
    assert run(*arguments, "--budget-ms", "1e6") == 0
    text = capsys.readouterr().out
    assert "budget met  yes" in text
    assert "tier " in text
    assert run(*arguments, "--budget-ms", "0.001", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["feasible"], values["budget_met"], values["knobs"]) == (False, False, "low/2/3")
    default = values["price"]
    assert values["measured_ms"] > 0
    assert values["drift_factor"] == 1.0
    alone = ["answer", "Which digit is red?", "--run-dir", run_dir, "--budget-ms", "1e6", "--json"]
    assert run(*alone) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["feasible"], values["vision"]["num_image_tokens"]) == (True, 0)
    assert run(*arguments, "--budget-ms", "1e6", "--price", "12.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["price"] == 12.5
    assert run("prices", "--run-dir", run_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[0]) for line in lines[1:-1]] == [0.0, *TrainConfig(run_dir, max_price=128.0).prices[1:]]
    assert [float(line.split()[0]) for line in lines if line.endswith("default")] == [default]


def test_prices_are_found_for_a_latency_or_a_loss(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prices", "--run-dir", run_dir]
    for option, place in ((("--points", "100"), -1), (("--mean-ms", "1e6"), 0)):
        assert run(*arguments, *option) == 0
        row = capsys.readouterr().out.splitlines()[1]
        assert float(row.split()[0]) == read_prices(run_dir).points[place].price
    for words, message in (
        (("--points", "-1"), "points is -1.0"),
        (("--points", "nan"), "points is nan"),
        (("--mean-ms", "0"), "mean_ms is 0.0"),
        (("--mean-ms", "1e-6"), "no price brings"),
        (("--mean-ms", "5", "--points", "1"), "give either"),
    ):
        assert run(*arguments, *words) == 2
        assert message in capsys.readouterr().err
    assert run("prices", "--run-dir", run_dir / "train") == 2
    assert "bundle.json" in capsys.readouterr().err


def test_answer_remembers_drift(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    image, state = tmp_path / "image.png", tmp_path / "drift.json"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(image)
    arguments = ["answer", image, "Which digit is red?", "--run-dir", run_dir, "--drift-state", state]
    for count in (1, 2):
        assert run(*arguments, "--budget-ms", "1e6") == 0
        assert "bounds were 1.00 times the profiled ones" in capsys.readouterr().out
        assert json.loads(state.read_text())["state"]["num_observations"] == count
    state.write_text("{}")
    assert run(*arguments, "--budget-ms", "1e6") == 2
    assert "not a drift correction" in capsys.readouterr().err


def sampled(text: str) -> tuple[str, str, list[str]]:
    """Question, answer and command that `sample` prints."""
    lines = text.splitlines()
    question, answer = (line.partition(": ")[2] for line in lines[1:3])
    return question, answer, shlex.split(lines[-1])


def test_a_sample_is_answered_right_by_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.request.run import run_forced

    path = tmp_path / "scene.png"
    assert run("sample", path) == 0
    question, reference, _ = sampled(capsys.readouterr().out)
    assert question == "Which digit is red?"
    model = ElasticModel.from_pretrained()
    for knobs in (model.knob_space.full, model.knob_space.cheapest):
        assert run_forced(model, path, question, knobs).answer == reference


@pytest.mark.parametrize("name", ["scene.png", "it's [a] $b.PNG", "-x.png", "new/é.png"])
def test_the_command_that_a_sample_prints_works(
    name: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("sample", "--", name) == 0
    program, *words = sampled(capsys.readouterr().out)[2]
    assert program == "pacevlm"
    assert run(*words, "--run-dir", run_dir) == 0
    assert "budget met" in capsys.readouterr().out


@pytest.mark.parametrize("numbers", [(), ("--index", "0"), ("--index", "7", "--seed", "1"), ("--index", "9999999")])
def test_a_sample_is_what_the_data_set_holds(
    numbers: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from pacevlm.data.digit_tasks import load_digits

    assert run("sample", tmp_path / "a.png", *numbers) == 0
    question, answer, _ = sampled(capsys.readouterr().out)
    index, seed = (int(number) for number in (*numbers[1::2], *(str(cli.SAMPLE_INDEX), "0")[len(numbers) // 2 :]))
    example = load_digits("test", index + 1, seed=seed)[index]
    assert (question, (answer,)) == (example.question, example.references)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.tobytes() == example.image.tobytes()
    assert run("sample", tmp_path / "b.png", *numbers) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_sample_takes_no_other_files_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scene.png"
    assert run("sample", path) == 0
    first, text = path.read_bytes(), capsys.readouterr().out
    assert run("sample", path) == 0
    assert capsys.readouterr().out == text
    assert run("sample", path, "--index", "3") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is there already and holds something else" in captured.err
    assert path.read_bytes() == first
    assert run("sample", path, "--index", "3", "--overwrite") == 0
    assert path.read_bytes() != first
    assert [entry.name for entry in tmp_path.iterdir()] == ["scene.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.jpg"], "give a name that ends in .png"),
        (["folder"], "give a name that ends in .png"),
        ([""], "path is empty"),
        (["~/x.png"], "only a shell knows"),
        (["--index", "-1"], "index is -1; it must be a whole number from 0"),
        (["--index", "10000000"], "index is 10000000; it must be"),
        (["--seed", "4294967296"], "seed is 4294967296; it must be"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("sample", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_sample_without_its_library_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['sklearn'] = None; from pacevlm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "sample", str(tmp_path / "scene.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "pacevlm: error: sklearn" in done.stderr
    assert "is not installed; pip install 'pacevlm[" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "nothing.png"}, "nothing.png"),
        ({"question": " "}, "question"),
        ({"image": "a.png", "more": "b.png"}, "2 images were given for one question; give at most one"),
        ({"image": None, "question": str(Path(__file__))}, "is a file; give the question behind it"),
        ({"image": None, "question": " "}, "question"),
        ({"image": None, "question": None}, "question"),
        ({"budget": "-3"}, "budget_ms is -3.0"),
        ({"price": "-3"}, "price is -3.0; it must be a number from 0 to 1000"),
        ({"price": "nan"}, "price is nan"),
        ({"price": "dear"}, "price"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_answer_refuses_unusable_input(
    changes: dict[str, str | None], message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    values = {"image": str(image), "question": "Which?", "budget": "50", "price": "0", "run": str(run_dir)} | changes
    words = [values[name] for name in ("image", "more", "question") if values.get(name) is not None]
    arguments = [*words, "--budget-ms", values["budget"], "--run-dir", values["run"], "--price", values["price"]]
    assert run("answer", *arguments) == 2
    assert message in capsys.readouterr().err


def test_importance_stores_an_order(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("importance", "--path", checkpoint, "--num-examples", "2", "--min-num-blocks", "3") == 0
    settings = json.loads((checkpoint / "elastic.json").read_text())
    assert len(settings["removal"]) == 3
    assert settings["measured_on"] == "digits-crossed, 2 examples, seed 0"
    said = capsys.readouterr()
    assert f"the order is in {checkpoint / 'elastic.json'}" in said.out
    # All blocks and five alone, four candidates, three candidates.
    assert "13 sets of blocks in 3 rounds, 2 examples each: 26 answers" in " ".join(said.err.split())
    detail = ("--mixture", "detail=1,overview=1", "--name", "detail", "--group-by", "task")
    assert run("importance", "--path", checkpoint, "--num-examples", "6", "--min-num-blocks", "3", *detail) == 0
    again = json.loads((checkpoint / "elastic.json").read_text())
    assert again["removal"] == settings["removal"]
    assert len(again["orders"]["detail"]["removal"]) == 3
    said = capsys.readouterr()
    assert "--model.block-order detail" in said.out
    assert "as many of all" in said.out
    assert run("importance", "--path", checkpoint, "--group-by", "dataset", "--num-examples", "2") == 2
    assert "group_by is 'dataset', which not every example has" in capsys.readouterr().err
    for name in ("importance", "a b", ""):
        assert run("importance", "--path", checkpoint, "--name", name) == 2
        assert "name is" in capsys.readouterr().err


def test_importance_says_at_once_that_it_cannot_write(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run("importance", "--path", checkpoint) == 2
    assert f"{checkpoint} cannot be written" in (error := capsys.readouterr().err)
    assert f"cp -rs {checkpoint} my-model" in error


def test_inspect_says_what_a_model_is_and_whether_it_runs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", checkpoint) == 0
    text = capsys.readouterr().out
    assert f"folder       {checkpoint}\n" in text
    assert "family       molmo, published layout\n" in text
    assert "runs         yes\n" in text
    assert "block order  importance; blocks left out first: 4, 2, 3\n" in text
    assert all(f"{width} x {height}" in text for width, height in ((640, 480), (1920, 1080)))
    (checkpoint / "elastic.json").unlink()
    assert run("inspect", checkpoint) == 2
    text = capsys.readouterr().out
    assert "runs         no\n    - " in text
    assert "pacevlm importance" in text
    assert "1024 x 768" in text
    assert run("inspect", checkpoint, "--block-order", "early_exit") == 0
    assert "early_exit; blocks left out first: 5\n" in capsys.readouterr().out
    assert run("inspect", checkpoint / "nothing") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pacevlm: error: there is no model directory")


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = "import sys; from pacevlm.cli import main; sys.exit(main(['evaluate', '--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (cli.PIPE_CLOSED, "")


def test_importance_says_when_nothing_was_right(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    lines = []
    for number in range(12):
        Image.new("RGB", (24, 30), (5 * number, 100, 50)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "Which?", "answer": "never said"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    arguments = ["--path", checkpoint, "--dataset", tmp_path / "questions.jsonl", "--num-examples", 2]
    assert run("importance", *arguments, "--min-num-blocks", 5) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "warning: none of 2 examples was answered right with all blocks" in error
    assert "never said" in error


def test_a_plan_is_printed_and_starts_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    before = (checkpoint / "elastic.json").read_bytes()
    data = ("--data.num-train", "80", "--data.num-val", "4", "--data.num-test", "4", "--train.steps", "2")
    for command, last in (
        ("quickstart", "evaluate"),
        ("profile", "profile"),
        ("train", "calibrate"),
        ("evaluate", "evaluate"),
    ):
        assert run(command, "--plan", "--model.path", checkpoint, "--run-dir", tmp_path / "run", *data) == 0
        said = capsys.readouterr().out
        steps = [line.split()[0] for line in said.splitlines()[2:] if " known " in line and ":" not in line]
        assert steps[-2:] == [last, "total"]
        assert "80 training, 4 validation, 4 test questions" in said
        assert "name one with --profile.source" in said
    assert run("importance", "--plan", "--path", checkpoint, "--num-examples", "20") == 0
    # All blocks and five alone; then at most four and three candidates.
    assert "13 sets of blocks in 3 rounds, 20 examples each: 260 answers" in capsys.readouterr().out
    assert run("importance", "--plan", "--path", checkpoint, "--min-num-blocks", "9") == 2
    assert "min_num_blocks is 9; it must be 1..5" in capsys.readouterr().err
    assert run("train", "--plan", "--run-dir", tmp_path / "run", *data, "--data.num-train", "30") == 2
    assert "30 training examples" in capsys.readouterr().err  # the run would be refused too
    assert run("train", "--plan", "--run-dir", tmp_path / "run", "--profile.source", "nothing.json") == 2
    assert "nothing.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (checkpoint / "elastic.json").read_bytes() == before
    assert sorted(path.name for path in checkpoint.iterdir() if path.name.startswith(".")) == []
