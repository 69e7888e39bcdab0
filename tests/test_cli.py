"""The command line: help, errors and exit codes, and every command once on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pacevlm import cli
from pacevlm.cli import COMMANDS, main
from pacevlm.errors import DataError

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
        "model.max-crops": "1 1 2",
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
    needed = ["image.png", "Which?", "--budget-ms", "5"] if name == "answer" else []
    where = [] if name == "importance" else ["--run-dir", str(tmp_path)]
    assert run(name, *needed, *where, "--no-such-option", "3") == 2
    assert "--no-such-option" in capsys.readouterr().err


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
    assert cli._given_run_dir(arguments) == expected


# Commands ------------------------------------------------------------------------------------------------------------


def test_quickstart_ends_with_a_report(run_dir: Path) -> None:
    report = (run_dir / "report.html").read_text()
    assert "pacevlm quickstart --run-dir" in report
    config = json.loads((run_dir / "config.json").read_text())
    assert config["train"]["grpo"]["group_size"] == 2
    assert config["model"]["max_crops"] == [1, 1, 2]


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
    assert values["measured_ms"] > 0
    assert values["drift_factor"] == 1.0


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "nothing.png"}, "nothing.png"),
        ({"question": " "}, "question"),
        ({"budget": "-3"}, "budget_ms is -3.0"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_answer_refuses_unusable_input(
    changes: dict[str, str], message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    values = {"image": str(image), "question": "Which?", "budget": "50", "run": str(run_dir)} | changes
    arguments = [values["image"], values["question"], "--budget-ms", values["budget"], "--run-dir", values["run"]]
    assert run("answer", *arguments) == 2
    assert message in capsys.readouterr().err


def test_importance_stores_an_order(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("importance", "--path", checkpoint, "--num-examples", "2", "--min-num-blocks", "3") == 0
    settings = json.loads((checkpoint / "elastic.json").read_text())
    assert len(settings["removal"]) == 3
    assert settings["measured_on"] == "digits, 2 examples, seed 0"
    assert f"the order is in {checkpoint / 'elastic.json'}" in capsys.readouterr().out


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


def test_a_bound_that_is_not_promised_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    from pacevlm.cli import _print_answer
    from pacevlm.knobs import Knobs
    from pacevlm.pacer import Answer
    from pacevlm.types import StageTimes

    why = "nothing is promised: no gif picture was profiled, only jpeg"
    times = StageTimes(3.0, 1.0, 0.5, 3.0, 2.0, 4.0, (1.0,), 14.5)
    answer = Answer("7", Knobs("low", 4, 12), 80.0, False, False, 14.0, math.inf, 14.5, times, 2, why_infeasible=why)
    _print_answer(answer, as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["upper_bound_ms"] is None
    assert values["why_infeasible"] == why
    assert values["times"]["read_ms"] == 3.0
    _print_answer(answer)
    shown = capsys.readouterr().out
    assert why in shown
    assert "nothing promised" in shown
    assert "read 3.0" in shown
    assert "inf" not in shown.replace("infeasible", "")
