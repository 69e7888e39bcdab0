"""A finished run notices what became of its data set and its model: nothing old is served, and what changed is said."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pacevlm.config import CalibrateConfig, DataConfig, EvaluateConfig, LookupConfig, ModelConfig, ProfileConfig
from pacevlm.data.division import part_of
from pacevlm.data.splits import load_splits
from pacevlm.errors import ConfigError, DataError, IdentityError, ProfileError
from pacevlm.evaluation.records import read_records
from pacevlm.evaluation.summary import format_summary, read_results
from pacevlm.files import read_jsonl
from pacevlm.pipeline import STEPS, RunConfig, run_pipeline
from pacevlm.pipeline.artefacts import PARTIAL_NAMES
from pacevlm.pipeline.step_log import StepLog
from pacevlm.request.run import run_forced
from pacevlm.training.grpo import GRPOConfig
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Example, pixel_digest
from tests.stored_answers import read_answers


class Recorder:
    """Remembers which steps ran and what was remarked."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.remarks: list[str] = []

    def started(self, step: str) -> None:
        self.ran.append(step)

    def skipped(self, step: str, facts: Mapping[str, Any]) -> None:
        pass

    def finished(self, step: str, seconds: float, facts: Mapping[str, Any]) -> None:
        pass

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        pass

    def missing(self, step: str, names: Sequence[str]) -> None:
        pass

    def warned(self, step: str, sentence: str) -> None:
        # A random model's answers are wrong, which is said too.
        if step == "data" or "is done again" in sentence:
            self.remarks.append(sentence)


def write_data(folder: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    """Three questions about each of 30 pictures."""
    if lines is None:
        lines = []
        for i in range(30):
            Image.new("RGB", (20 + i, 24), (8 * i, 100, 7)).save(folder / f"{i}.png")
            lines += [{"image": f"{i}.png", "question": f"{q} digits?", "answer": [str(q), "x"]} for q in range(3)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "data.jsonl"


def read_data(config: RunConfig) -> list[dict[str, Any]]:
    return read_jsonl(config.data.dataset, "data set", DataError)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> RunConfig:
    folder = tmp_path_factory.mktemp("changed")
    (folder / "data").mkdir()
    shutil.copytree(tiny_elastic_dir, folder / "model")
    config = RunConfig(
        run_dir=folder / "run",
        model=ModelConfig(path=str(folder / "model"), max_new_tokens=2, vision_budgets=(1, 1, 2)),
        data=DataConfig(dataset=str(write_data(folder / "data")), num_train=24, num_val=6, num_test=6),
        profile=ProfileConfig(num_requests=4, num_samples=24, repeats=1, max_warmup=1, num_lengths=24, alpha=0.3),
        lookup=LookupConfig(num_examples=3),
        train=TrainConfig(
            run_dir=Path("train"), steps=1, batch_size=4, budgets_per_example=2, grpo=GRPOConfig(group_size=3)
        ),
        calibrate=CalibrateConfig(num_requests=6),
        evaluate=EvaluateConfig(budgets=(1.0,), num_timed=1, num_warmup=0),
    )
    run_pipeline(config)
    return config


@pytest.fixture
def copied(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of run, data and model that may be changed."""
    shutil.copytree(finished.run_dir.parent, tmp_path / "all")
    data = dataclasses.replace(finished.data, dataset=str(tmp_path / "all" / "data" / "data.jsonl"))
    model = dataclasses.replace(finished.model, path=str(tmp_path / "all" / "model"))
    return dataclasses.replace(finished, run_dir=tmp_path / "all" / "run", data=data, model=model)


def change_line(config: RunConfig, example: Example, **changes: Any) -> None:
    lines = read_data(config)
    for line in lines:
        if (line["image"], line["question"]) == (Path(str(example.source)).name, example.question):
            line.update(changes)
    write_data(Path(config.data.dataset).parent, lines)


def test_the_parts_share_no_picture_and_the_answers_hold_no_score(finished: RunConfig) -> None:
    splits = load_splits(finished.data)
    parts = [{pixel_digest(e.image) for e in part} for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [24, 6, 6]
    assert sum(map(len, parts)) == len(set().union(*parts))
    stored = read_answers(finished.run_dir / "outcomes.sqlite")
    assert {row.content for row in stored} <= {e.content_id for e in (*splits.train, *splits.val, *splits.test)}
    # No row has room for a score: `Row` names all that there is.


def test_another_order_of_lines_or_another_folder_changes_nothing(copied: RunConfig) -> None:
    lines = read_data(copied)
    random.Random(0).shuffle(lines)
    write_data(Path(copied.data.dataset).parent, lines)
    again = Recorder()
    run_pipeline(copied, reporter=again)
    assert (again.ran, again.remarks) == ([], [])


@pytest.mark.parametrize("until", STEPS)
def test_a_changed_reference_of_training_is_said_by_every_step(copied: RunConfig, until: str) -> None:
    change_line(copied, load_splits(copied.data).train[-1], answer="7")
    with pytest.raises(ConfigError, match=r"the training examples changed .*--fresh"):
        run_pipeline(copied, until)


def test_a_changed_picture_or_question_of_training_is_said(copied: RunConfig) -> None:
    example = load_splits(copied.data).train[0]
    change_line(copied, example, question="Else?")
    with pytest.raises(ConfigError, match="the training examples changed"):
        run_pipeline(copied)
    change_line(copied, dataclasses.replace(example, question="Else?"), question=example.question)
    again = Recorder()
    run_pipeline(copied, reporter=again)
    assert again.ran == []
    Image.new("RGB", (33, 33), "red").save(example.source)
    with pytest.raises(ConfigError, match="the training examples changed"):
        run_pipeline(copied)


def test_a_changed_reference_of_the_test_part_is_judged_anew_from_the_same_answers(copied: RunConfig) -> None:
    example = load_splits(copied.data).test[0]
    records = read_records(copied.run_dir / "records.jsonl")
    old = {r.policy: r for r in records if r.example_id == example.example_id}
    change_line(copied, example, answer=["7", old["full"].metadata["answer"]])
    again = Recorder()
    run = run_pipeline(copied, reporter=again)
    assert again.ran == ["evaluate"]
    assert any("evaluate is done again: the test examples changed" in remark for remark in again.remarks)
    assert run.engine.num_run == 0
    records = read_records(copied.run_dir / "records.jsonl")
    (full,) = [r for r in records if r.policy == "full" and r.example_id == example.example_id]
    assert (old["full"].accuracy, full.accuracy) == (0.0, 1.0)


def test_answers_about_an_overwritten_picture_are_not_served(copied: RunConfig) -> None:
    example = load_splits(copied.data).test[0]
    colours = ((c, 3, 9) for c in range(256))
    pictures = (Image.new("RGB", (60, 40), colour) for colour in colours)
    new = next(picture for picture in pictures if part_of(pixel_digest(picture), copied.data.seed) == "test")
    new.save(example.source)
    again = Recorder()
    run = run_pipeline(copied, reporter=again)
    assert again.ran == ["evaluate"]
    now = [e for e in run.splits.test if Path(str(e.source)).name == Path(str(example.source)).name]
    assert len(now) == 3
    assert run.engine.num_run == len(now) * len(run.model.knob_space)
    for e in now:
        for knobs in (run.model.knob_space.full, run.model.knob_space.cheapest):
            stored = run.engine.store.get(e.content_id, knobs)
            assert stored is not None
            assert stored.answer == run_forced(run.model, new, e.question, knobs).answer


def test_another_metric_is_another_setting_and_answers_stay(copied: RunConfig) -> None:
    before = (copied.run_dir / "outcomes.sqlite").read_bytes()
    changed = dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="anls"))
    with pytest.raises(ConfigError, match=r"data\.metric was 'exact_match', now 'anls'"):
        run_pipeline(changed)
    assert (copied.run_dir / "outcomes.sqlite").read_bytes() == before
    # The same metric under its name is no change.
    again = Recorder()
    named = dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="exact_match"))
    run_pipeline(named, reporter=again)
    assert again.ran == []


def test_another_metric_before_training_scores_the_stored_answers(copied: RunConfig) -> None:
    StepLog(copied.run_dir).remove("train", "calibrate", "evaluate")
    shutil.rmtree(copied.run_dir / "train")
    changed = dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="anls"))
    again = Recorder()
    run = run_pipeline(changed, "lookup", reporter=again)
    assert again.ran == ["lookup"]
    assert any("data.metric was 'exact_match', now 'anls'" in remark for remark in again.remarks)
    assert run.engine.num_run == 0


def test_results_and_report_say_what_accuracy_means(copied: RunConfig) -> None:
    assert read_results(copied.run_dir / "results.json")["metric"] == {"name": "exact_match", "summaries": {}}
    StepLog(copied.run_dir).remove("train", "calibrate", "evaluate")
    shutil.rmtree(copied.run_dir / "train")
    run_pipeline(dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="f1")))
    results = read_results(copied.run_dir / "results.json")
    assert results["metric"]["name"] == "f1"
    for policy, row in results["budgets"][0]["policies"].items():
        numbers = results["metric"]["summaries"][policy]["1"]
        assert numbers["f1"] == pytest.approx(row["accuracy"]["mean"])
        assert numbers["exact_match"] <= numbers["f1"]
    assert "<td>metric</td><td>f1</td>" in (copied.run_dir / "report.html").read_text()
    assert "f1" in format_summary(results).splitlines()[0]


def test_training_goes_on_with_no_other_metric(copied: RunConfig) -> None:
    StepLog(copied.run_dir).remove("train", "calibrate", "evaluate")
    changed = dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="anls"))
    with pytest.raises(IdentityError, match=r"metric"):
        run_pipeline(changed, "train")


def test_one_changed_weight_is_another_model(copied: RunConfig) -> None:
    path = Path(copied.model.path) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IdentityError, match=r"another model or knob space: model\.identity"):
        run_pipeline(copied)


def test_finished_steps_need_their_data_no_longer(copied: RunConfig) -> None:
    shutil.rmtree(Path(copied.data.dataset).parent)
    again = Recorder()
    run_pipeline(copied, reporter=again)
    assert (again.ran, again.remarks) == ([], [])
    with pytest.raises(ConfigError, match=r"data\.metric was 'exact_match', now 'anls'"):
        run_pipeline(dataclasses.replace(copied, data=dataclasses.replace(copied.data, metric="anls")))
    for changes in ({"num_test": 14}, {"seed": 5}, {"test_dataset": "no.jsonl"}, {"dataset": "/no/other.jsonl"}):
        with pytest.raises(DataError, match="there is no data set at"):
            run_pipeline(dataclasses.replace(copied, data=dataclasses.replace(copied.data, **changes)))
    more = dataclasses.replace(copied, evaluate=dataclasses.replace(copied.evaluate, budgets=(0.9,)))
    with pytest.raises(DataError, match=r"there is no data set at .*data\.jsonl"):
        run_pipeline(more)


def test_lines_that_were_left_out_are_remarked(copied: RunConfig) -> None:
    lines = read_data(copied)
    write_data(Path(copied.data.dataset).parent, [*lines, {**lines[0], "image": "gone.png"}])
    again = Recorder()
    run_pipeline(
        dataclasses.replace(copied, data=dataclasses.replace(copied.data, skip_unreadable=True)), reporter=again
    )
    assert again.ran == []
    assert again.remarks[0].startswith("1 line left out, whose picture cannot be read: ")
    assert "data.jsonl, line 91: there is no image" in again.remarks[0]


class Stopper(Recorder):
    """Stops after so many timed requests."""

    def __init__(self, num_timed: int) -> None:
        super().__init__()
        self.num_timed = num_timed

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == "timed requests" and done >= self.num_timed:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "part"), [("profile", "train"), ("calibrate", "val"), ("evaluate", "test")])
def test_what_an_unfinished_step_measured_goes_with_the_question_that_it_asked(
    step: str, part: str, copied: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pacevlm.pipeline.steps.WINDOW", 2)
    monkeypatch.setattr("pacevlm.evaluation.timed.WINDOW", 1)
    copied = dataclasses.replace(copied, evaluate=dataclasses.replace(copied.evaluate, num_timed=4))
    for example in getattr(load_splits(copied.data), part):
        change_line(copied, example, id=f"mine {example.content_id}")  # names that say nothing of the content
    examples = list(getattr(load_splits(copied.data), part))
    StepLog(copied.run_dir).remove(*STEPS[STEPS.index(step) :])
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(copied, step, reporter=Stopper(4))
    partial = copied.run_dir / PARTIAL_NAMES[step][0]
    kept = partial.read_bytes()
    assert kept.count(b"\n") > 1
    with pytest.raises(KeyboardInterrupt):  # the same goes on
        run_pipeline(copied, step, reporter=Stopper(1))
    assert partial.read_bytes().startswith(kept)
    for example in examples:
        change_line(copied, example, question=f"{example.question} Really?")
    if step == "profile":  # which takes hours where a model is large
        with pytest.raises(ProfileError, match="begun for another requests; remove it"):
            run_pipeline(copied, step)
        assert partial.read_bytes().startswith(kept)
        return
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(copied, step, reporter=Stopper(1))
    assert not partial.read_bytes().startswith(kept.splitlines()[0])
