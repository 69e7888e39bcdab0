"""A run directory is the run wherever it lies: one writer, whole after every stop, usable when half of it is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.cli import main
from pacevlm.config import (
    CalibrateConfig,
    DataConfig,
    EvaluateConfig,
    LookupConfig,
    ModelConfig,
    ProfileConfig,
)
from pacevlm.controller.policy_interface import Policy
from pacevlm.data.splits import load_splits
from pacevlm.errors import ConfigError, PacevlmError, StorageError
from pacevlm.evaluation.summary import POLICY_ORDER
from pacevlm.evaluation.sweep import choose_knobs
from pacevlm.evaluation.timed import TimedRequests, time_requests
from pacevlm.knobs import Knobs
from pacevlm.pacer import Pacer
from pacevlm.pipeline import STEPS, RunConfig, run_pipeline
from pacevlm.pipeline.artefacts import PARTIAL_NAMES, made_files, source_files
from pacevlm.pipeline.context import RunContext, SilentReporter
from pacevlm.pipeline.lock import LOCK_NAME, one_writer
from pacevlm.pipeline.run_config import load_run_config, read_run_file, save_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.training.grpo import GRPOConfig
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Objective
from tests.stored_answers import read_answers

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "controller/controller.safetensors"


class Reporter(SilentReporter):
    """Notes which steps ran and what was missing; interrupts a piece of work of one step once it has come so far."""

    def __init__(self, interrupt: tuple[str, str, int] | None = None) -> None:
        self.interrupt, self.step = interrupt, ""
        self.ran: list[str] = []
        self.gone: list[str] = []
        self.done: dict[tuple[str, str], list[int]] = {}

    def started(self, step: str) -> None:
        self.step = step
        self.ran.append(step)

    def missing(self, step: str, names: Sequence[str]) -> None:
        self.gone += names

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        self.done.setdefault((self.step, what), []).append(done)
        if self.interrupt is not None and (self.step, what) == self.interrupt[:2] and done >= self.interrupt[2]:
            raise KeyboardInterrupt


def make_config(run_dir: Path, model_dir: Path, **changes: object) -> RunConfig:
    config = RunConfig(
        run_dir=run_dir,
        model=ModelConfig(path=str(model_dir), max_new_tokens=2, vision_budgets=(1, 1, 1)),
        data=DataConfig(num_train=24, num_val=4, num_test=4),
        profile=ProfileConfig(num_requests=4, num_samples=16, repeats=1, max_warmup=1, num_lengths=24, alpha=0.3),
        lookup=LookupConfig(num_examples=2),
        train=TrainConfig(
            run_dir=Path("train"), steps=2, batch_size=2, budgets_per_example=1, grpo=GRPOConfig(group_size=2)
        ),
        calibrate=CalibrateConfig(num_requests=24),
        evaluate=EvaluateConfig(budgets=(0.7, 1.0), num_timed=2, num_warmup=0),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> Path:
    """A folder with a model, a data set with pictures and a finished run on them; copy it before changing it."""
    home = tmp_path_factory.mktemp("home") / "first"
    shutil.copytree(tiny_elastic_dir, home / "model")
    lines = []
    for example in load_splits(DataConfig(num_train=40, num_val=1, num_test=1)).train:
        example.image.save(home / f"{example.example_id}.png")
        question, answer = example.question, example.references[0]
        lines.append(
            json.dumps({"image": f"{example.example_id}.png", "question": question, "answer": answer, "id": len(lines)})
        )
    (home / "questions.jsonl").write_text("\n".join(lines))
    data = DataConfig(str(home / "questions.jsonl"), num_train=24, num_val=4, num_test=4)
    run_pipeline(make_config(home / "run", home / "model", data=data))
    return home


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Path:
    """Everything copied to another place, as to another machine: what is named there must be found there."""
    return Path(shutil.copytree(home, tmp_path / "other" / "second"))


def here(moved: Path) -> RunConfig:
    return load_run_config(moved / "run")


def run_cli(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


# One writer -----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pacevlm.pipeline.lock import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_and_a_killed_one_leaves_no_lock(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = moved / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for arguments in (["train"], ["train", "--fresh"], ["report"]):
            assert run_cli(*arguments, "--run-dir", run_dir) == 2
            assert f"{run_dir} is in use" in capsys.readouterr().err
        assert (run_dir / "results.json").exists()
        Pacer.from_pretrained(run_dir)  # who only reads needs no lock
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run_cli("report", "--run-dir", run_dir) == 0


def test_one_process_does_not_write_twice_either(tmp_path: Path) -> None:
    with one_writer(tmp_path), pytest.raises(ConfigError, match="in use"), one_writer(tmp_path):
        pass
    with one_writer(tmp_path):
        pass


def test_a_lock_makes_no_directory_foreign(tmp_path: Path, tiny_elastic_dir: Path) -> None:
    with one_writer(tmp_path / "run"):
        pass
    config = make_config(tmp_path / "run", tiny_elastic_dir)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, fresh=True, reporter=Reporter(("profile", "timed requests", 1)))


@pytest.mark.parametrize("command", ["profile", "train"])
def test_a_folder_that_cannot_be_written_is_a_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert run_cli(command, "--run-dir", run_dir) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert str(run_dir) in line
    with pytest.raises(StorageError, match="cannot be written"), one_writer("/proc/run"):
        pass


# Moved ----------------------------------------------------------------------------------------------------------------


def test_a_copy_is_used_and_named_and_nothing_points_back(
    home: Path, moved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = moved / "run"
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    home.rename(home.with_name("gone"))  # what still pointed there would fail
    try:
        monkeypatch.chdir("/")
        for command in ("report", "evaluate", "train"):
            (run_dir / "report.html").unlink(missing_ok=True)
            assert run_cli(command, "--run-dir", run_dir) == 0, capsys.readouterr().err
            captured = capsys.readouterr()
            assert str(run_dir) in captured.out
            assert str(home) not in captured.out + captured.err
        assert (run_dir / "report.html").exists() is False or run_cli("report", "--run-dir", run_dir) == 0
        picture = next(moved.glob("*.png"))
        assert run_cli("answer", picture, "Which?", "--budget-ms", "1e6", "--run-dir", run_dir) == 0
    finally:
        home.with_name("gone").rename(home)
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    texts = {path.name: path.read_text() for path in run_dir.rglob("*") if path.suffix in (".json", ".jsonl", ".html")}
    pointing = {name for name, text in texts.items() if str(home / "run") in text}
    assert pointing <= {"run.json"}  # where training was started is history


def test_a_run_directory_moves_alone(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(home / "run", tmp_path / "deep" / "er" / "run")
    reporter = Reporter()
    run_pipeline(load_run_config(run_dir), reporter=reporter)
    assert reporter.ran == []
    Pacer.from_pretrained(run_dir)


def test_a_copied_report_needs_nothing_but_its_folder(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.move(moved / "run", tmp_path / "alone")
    shutil.rmtree(moved)
    whole = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    assert run_cli("report", "--run-dir", run_dir) == 0
    again = (run_dir / "report.html").read_text()
    assert again.count('class="picture"') == whole.count('class="picture"') > 0
    assert str(run_dir / "report.html") in capsys.readouterr().out


def test_the_same_data_elsewhere_is_the_same_data_and_other_data_is_not(moved: Path) -> None:
    shutil.move(moved / "questions.jsonl", moved / "renamed.jsonl")
    config = here(moved)
    again = Reporter()
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=str(moved / "renamed.jsonl")))
    run_pipeline(changed, reporter=again)
    assert again.ran == []
    learned_from = load_splits(changed.data).train[0].example_id
    lines = (moved / "renamed.jsonl").read_text().splitlines()
    lines = [line for line in lines if str(json.loads(line)["id"]) != learned_from]
    (moved / "renamed.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="the training examples changed"):
        run_pipeline(changed)


@pytest.mark.parametrize("name", ["results.json", "records.jsonl", "shown.json", "config.json"])
def test_what_is_missing_is_called_missing(name: str, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (moved / "run" / name).unlink()
    assert run_cli("report", "--run-dir", moved / "run") == 2
    error = capsys.readouterr().err
    assert "there is no" in error
    assert name in error
    assert "damaged" not in error
    assert "JSON (" not in error


# Stopped --------------------------------------------------------------------------------------------------------------


def outcomes(run_dir: Path) -> int:
    return len(read_answers(run_dir / "outcomes.sqlite"))


@pytest.mark.parametrize(("step", "done"), [("profile", 9), ("calibrate", 20), ("evaluate", 14)])
def test_timed_requests_are_not_timed_twice(step: str, done: int, moved: Path) -> None:
    config, what = here(moved), "timed requests"
    StepLog(config.run_dir).remove(*STEPS[STEPS.index(step) :])
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, step, reporter=Reporter((step, what, done)))
    partial = config.run_dir / PARTIAL_NAMES[step][0]
    kept = partial.read_bytes()
    again = Reporter((step, what, 1))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, step, reporter=again)
    assert again.done[step, what][0] > done
    assert partial.read_bytes().startswith(kept)
    with partial.open("ab") as file:  # killed while it appended
        file.write(b'{"torn": ')
    run_pipeline(config, step)
    assert not partial.exists()


@pytest.mark.parametrize(
    ("step", "stopped_in"), [("profile", "fit_latency"), ("calibrate", "write_bundle"), ("evaluate", "write_outputs")]
)
def test_a_stop_behind_the_last_request_loses_none(
    step: str, stopped_in: str, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = here(moved)
    StepLog(config.run_dir).remove(*STEPS[STEPS.index(step) :])

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"pacevlm.pipeline.steps.{stopped_in}", stop)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(config, step)
    again = Reporter()
    run_pipeline(config, step, reporter=again)
    assert again.ran == [step]
    assert not again.done.get((step, "timed requests"))


def test_a_resumed_evaluation_has_the_rounds_and_the_correction_of_the_one_that_was_stopped(moved: Path) -> None:
    run = RunContext(here(moved))
    space, path = run.model.knob_space, run.run_dir / "timed.partial.jsonl"
    settings = EvaluateConfig(budgets=(0.7, 1.0), num_timed=3, num_warmup=2)
    objectives = [Objective(fraction * run.full_p50_ms) for fraction in settings.budgets]

    def time_all(partial_path: Path | None) -> TimedRequests:
        policies = [FullPolicy(space), CheapestPolicy(space)]
        examples = list(run.splits.test)
        return time_requests(run.model, policies, examples, objectives, run.pacing(), settings, None, partial_path)

    whole = time_all(path)
    assert time_all(path).runs == whole.runs
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 3
    path.write_text("".join(lines[:4]) + lines[4][:50])
    resumed = time_all(path)
    again = path.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    # The same rounds in the same order, each policy in its turn, and the machine's factor learned from all of them.
    assert list(resumed.runs) == list(whole.runs)
    kept = list(whole.runs)[:6]
    assert [resumed.runs[key] for key in kept] == [whole.runs[key] for key in kept]
    assert [resumed.runs[key] for key in list(whole.runs)[6:]] != [whole.runs[key] for key in list(whole.runs)[6:]]
    states = [json.loads(line)["drift"]["state"]["num_observations"] for line in again[1:]]
    assert states == [2 + 2 * number for number in range(1, 7)]
    assert resumed.factors.shape == (2, len(run.splits.test))
    assert (resumed.factors > 0).all()


def test_choices_are_not_made_twice(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = here(moved)
    StepLog(config.run_dir).remove(*STEPS[4:])
    before = (config.run_dir / "records.jsonl").read_text()
    monkeypatch.setattr("pacevlm.evaluation.sweep.CHUNK", 3)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, reporter=Reporter(("evaluate", "choices", 5)))
    kept = (config.run_dir / "choices.partial.jsonl").read_text()
    num_chosen = 0

    def counted(policy: Policy, *rest: Any) -> list[Knobs]:
        nonlocal num_chosen
        num_chosen += 1
        return choose_knobs(policy, *rest)

    monkeypatch.setattr("pacevlm.evaluation.sweep.choose_knobs", counted)
    run_pipeline(config)
    assert kept.count("\n") == 1 + 2 * 5
    # Fronts are not kept: four policies at every price.
    assert num_chosen == 2 * (len(POLICY_ORDER) * 2 - 5) + 4 * len(config.train.prices)
    assert not list(config.run_dir.glob("*.partial.jsonl"))
    assert (config.run_dir / "records.jsonl").read_text().count("\n") == before.count("\n")


def test_other_work_than_a_partial_file_began_is_begun_anew(moved: Path) -> None:
    config = here(moved)
    changed = dataclasses.replace(config, calibrate=CalibrateConfig(num_requests=30))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(changed, "calibrate", reporter=Reporter(("calibrate", "timed requests", 20)))
    other = dataclasses.replace(config, calibrate=CalibrateConfig(num_requests=31))
    run = run_pipeline(other, "calibrate")
    assert run.run_dir == config.run_dir
    step = StepLog(config.run_dir).get("calibrate")
    assert step is not None
    assert step.facts["num_requests"] == 31


def test_a_damaged_partial_file_is_a_sentence(moved: Path) -> None:
    config = dataclasses.replace(here(moved), calibrate=CalibrateConfig(num_requests=30))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, "calibrate", reporter=Reporter(("calibrate", "timed requests", 20)))
    partial = config.run_dir / PARTIAL_NAMES["calibrate"][0]
    lines = partial.read_bytes().splitlines(keepends=True)
    for damaged in ([*lines[:2], b"not JSON\n", *lines[2:]], [*lines, b'{"budget_ms": "many"}\n']):
        partial.write_bytes(b"".join(damaged))
        with pytest.raises(PacevlmError, match=r"remove"):
            run_pipeline(config, "calibrate")


STOPPED = """
import sys
from pacevlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_keeps_its_outcomes(number: signal.Signals, moved: Path) -> None:
    run_dir = moved / "run"
    arguments = ["train", "--run-dir", str(run_dir), "--profile.num-samples", "4000", "--fresh"]
    config = here(moved)
    settings = {
        "--model.path": config.model.path,
        "--model.max-new-tokens": "2",
        "--data.dataset": config.data.dataset,
        "--profile.num-requests": "4",
        "--profile.max-warmup": "1",
        "--profile.max-megapixels": "0.02",
        "--profile.alpha": "0.3",
        "--profile.num-lengths": "24",
    }
    arguments += [word for pair in settings.items() for word in pair]
    partial = run_dir / PARTIAL_NAMES["profile"][0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPPED, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 5):
            time.sleep(0.02)
        num_before = partial.read_bytes().count(b"\n")
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    if number is signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; the same command without --fresh goes on where it stopped" in error
    assert partial.read_bytes().count(b"\n") >= num_before
    assert not list(run_dir.rglob("*.tmp")) or number is signal.SIGKILL
    reporter = Reporter(("profile", "timed requests", 1))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(load_run_config(run_dir), "profile", reporter=reporter)
    assert reporter.done["profile", "timed requests"][0] >= num_before


# Half gone ------------------------------------------------------------------------------------------------------------


def all_files(config: RunConfig) -> list[str]:
    return [name for step in STEPS for name in (*source_files(config, step), *made_files(config, step))]


def test_every_file_of_a_step_is_made_again_when_it_is_gone(moved: Path) -> None:
    config = here(moved)
    before = {name: (config.run_dir / name).read_bytes() for name in all_files(config)}
    made = [name for step in STEPS for name in made_files(config, step)]
    for name in made:
        (config.run_dir / name).unlink()
    again = Reporter()
    run_pipeline(config, reporter=again)
    assert again.ran == []  # nothing is measured or learned again
    assert again.gone == made
    for name in made:
        # Times, places and the order of outcomes may differ.
        if name not in ("train/run.json", "bundle/bundle.json", "outcomes.sqlite", "report.html") and not name.endswith(
            (".svg", ".png")
        ):
            assert (config.run_dir / name).read_bytes() == before[name], name


@pytest.mark.parametrize("step", STEPS)
def test_a_step_whose_measurements_are_gone_runs_again(step: str, moved: Path) -> None:
    config = here(moved)
    if step == "lookup":
        return
    name = source_files(config, step)[0]
    (config.run_dir / name).unlink()
    again = Reporter()
    run_pipeline(config, reporter=again)
    assert again.gone == [name]
    assert again.ran[0] == step
    assert not [name for name in all_files(config) if not (config.run_dir / name).is_file()]


def test_train_never_prints_a_bundle_that_is_not_there(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(moved / "run" / "bundle")
    assert run_cli("train", "--run-dir", moved / "run") == 0
    captured = capsys.readouterr()
    assert str(moved / "run" / "bundle") in captured.out
    assert "bundle/bundle.json" in captured.err
    Pacer.from_pretrained(moved / "run")


def test_half_a_training_is_no_dead_end(moved: Path) -> None:
    config = here(moved)
    weights = (config.run_dir / WEIGHTS).read_bytes()
    for names in (
        ["train/checkpoint.safetensors", WEIGHTS],
        ["train/metrics.jsonl", WEIGHTS],
        ["train/metrics.jsonl", "train/run.json", "train/checkpoint.safetensors"],
    ):
        for name in names:
            (config.run_dir / name).unlink()
        run_pipeline(config, "train")
        assert (config.run_dir / WEIGHTS).read_bytes() == weights
    shutil.rmtree(config.run_dir / "train")
    (config.run_dir / "steps.json").unlink()
    run_pipeline(config)


@pytest.mark.parametrize(
    "gone", [["config.json"], ["config.json", LOCK_NAME], ["steps.json", "config.json", LOCK_NAME]]
)
def test_a_folder_deleted_half_way_can_be_cleared(gone: list[str], moved: Path) -> None:
    config = here(moved)
    for name in gone:
        (config.run_dir / name).unlink()
    (config.run_dir / "notes.txt").write_text("mine")
    (config.run_dir / "controller" / "notes.txt").write_text("mine")
    (config.run_dir / ".report.html.1234abcd.tmp").write_text("torn")
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, fresh=True, reporter=Reporter(("profile", "timed requests", 1)))
    left = {str(path.relative_to(config.run_dir)) for path in config.run_dir.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "controller/notes.txt", "config.json", LOCK_NAME, PARTIAL_NAMES["profile"][0]}


def test_clearing_that_was_stopped_can_be_done_again(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = here(moved)
    (config.run_dir / LOCK_NAME).unlink()
    num_left = len(list(config.run_dir.rglob("*")))
    unlink: Callable[..., None] = Path.unlink
    for _ in range(num_left):
        count = 0

        def stopping(path: Path, missing_ok: bool = False) -> None:
            nonlocal count
            if path.exists():
                count += 1
                if count > 1:
                    raise KeyboardInterrupt
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", stopping)
            with pytest.raises(KeyboardInterrupt):
                run_pipeline(config, fresh=True, reporter=Reporter(("profile", "timed requests", 1)))
        if (config.run_dir / PARTIAL_NAMES["profile"][0]).exists():
            return
    pytest.fail("the directory was never cleared")


@pytest.mark.parametrize("names", [["notes.txt"], ["train/precious"], ["config.json"], ["results.json", "report.html"]])
def test_what_is_no_run_is_left_alone(names: list[str], tmp_path: Path, tiny_elastic_dir: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "mine"}')
    with pytest.raises(ConfigError, match="nothing was removed"):
        run_pipeline(make_config(tmp_path, tiny_elastic_dir), fresh=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(names)


@pytest.mark.parametrize(
    ("name", "step"), [("estimator.json", "profile"), (WEIGHTS, "train"), ("guardrail.json", "calibrate")]
)
def test_damage_says_how_to_go_on_and_that_works(name: str, step: str, moved: Path) -> None:
    config = dataclasses.replace(here(moved), evaluate=EvaluateConfig(budgets=(0.8,), num_timed=1, num_warmup=0))
    path = config.run_dir / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PacevlmError, match=r"Remove the file, and the same command makes it again, or .* --fresh"):
        run_pipeline(config)
    path.unlink()
    run_pipeline(config)


def test_the_paths_of_a_mixture_move_with_the_run(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "docvqa").mkdir(parents=True)
    (home / "q.jsonl").touch()
    dataset = "docvqa={0}/docvqa:2,{0}/q.jsonl,textvqa"
    save_run_config(RunConfig(run_dir=home / "run", data=DataConfig(dataset.format(home))))
    moved = tmp_path / "moved"
    shutil.copytree(home, moved)
    assert load_run_config(moved / "run").data.dataset == dataset.format(moved)
    shutil.copytree(home / "run", tmp_path / "elsewhere" / "run")  # alone
    assert load_run_config(tmp_path / "elsewhere" / "run").data.dataset == dataset.format(home)
    (home / "run.toml").write_text('[data]\ndataset = "docvqa=docvqa:2,q.jsonl,textvqa"\n')
    assert read_run_file(home / "run.toml").on_top_of(RunConfig()).data.dataset == dataset.format(home)
