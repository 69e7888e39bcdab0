"""What a run lacks is said by the setting's name before its first long step; what is let through ends well."""

from __future__ import annotations

import dataclasses
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pacevlm.errors import ConfigError, DataError, PacevlmError
from pacevlm.pipeline import STEPS, RunConfig, run_pipeline
from pacevlm.pipeline.context import SilentReporter
from pacevlm.pipeline.plan import plan_run
from pacevlm.pipeline.run_config import save_run_config
from tests.pipeline.test_run import Recorder, make_config


class Stopped(Exception):
    """A long step was about to begin."""


class Stopper(SilentReporter):
    """Ends a run as soon as a step begins."""

    def started(self, step: str) -> None:
        raise Stopped(step)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The settings with some replaced, each by its full name with two underscores for the dot."""
    for path, value in changes.items():
        section, _, name = path.partition("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


SEEN_WITHOUT_A_MODEL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"data__num_train": 19}, DataError, r"19 training examples.*at least 20.*data\.num_train"),
    ({"profile__num_lengths": 19}, ConfigError, r"profile\.num_lengths is 19.*at least 20"),
    ({"profile__alpha": 0.01}, DataError, r"profile\.alpha 0\.01 needs at least 198"),
    ({"calibrate__num_requests": 2}, ConfigError, r"calibrate\.num_requests is 2.*at least 3"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        *SEEN_WITHOUT_A_MODEL,
        ({"profile__num_samples": 2}, ConfigError, r"profile\.num_samples"),
        ({"profile__num_requests": 2, "profile__num_samples": 4}, DataError, r"profile\.num_requests"),
        ({"model__max_new_tokens": 1}, ConfigError, r"model\.max_new_tokens is 1"),
    ],
)
def test_too_little_is_said_before_anything_long(
    changes: dict[str, Any], kind: type[Exception], message: str, tiny_elastic_dir: Path, tmp_path: Path
) -> None:
    config = changed(make_config(tmp_path / "run", tiny_elastic_dir), **changes)
    for fresh in (False, True):
        with pytest.raises(kind, match=message):
            run_pipeline(config, fresh=fresh, reporter=Stopper())
    assert not config.run_dir.exists()


@pytest.mark.parametrize(("changes", "kind", "message"), SEEN_WITHOUT_A_MODEL)
def test_no_run_is_planned_that_would_be_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, tiny_elastic_dir: Path, tmp_path: Path
) -> None:
    config = changed(make_config(tmp_path / "run", tiny_elastic_dir), **changes)
    with pytest.raises(kind, match=message):
        plan_run(config)
    if "calibrate__num_requests" in changes:  # what a step lacks that is not planned does not matter
        assert plan_run(config, "train").steps


def test_what_is_let_through_is_not_too_little(tiny_elastic_dir: Path, tmp_path: Path) -> None:
    # Small numbers at random: each run is refused at once, or profiles to its end.
    rng = random.Random(1)
    refused = 0
    for number in range(8):
        config = changed(
            make_config(tmp_path / str(number), tiny_elastic_dir),
            data__num_train=rng.choice((20, 24, 40)),
            profile__num_requests=rng.randint(2, 6),
            profile__num_samples=rng.randint(4, 16),
            profile__alpha=rng.choice((0.2, 0.3, 0.5)),
            profile__seed=rng.randint(0, 9),
            profile__max_warmup=0,
        )
        recorder = Recorder()
        with suppress(PacevlmError):
            run_pipeline(config, "profile", reporter=recorder)
        assert recorder.of("finished") == recorder.of("started")
        refused += not recorder.of("finished")
    assert 0 < refused < 8


def test_a_run_that_lacks_something_keeps_what_is_there(tiny_elastic_dir: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_elastic_dir)
    save_run_config(config)
    (tmp_path / "profile.json").write_text("precious")
    with pytest.raises(ConfigError, match="num_lengths"):
        run_pipeline(changed(config, profile__num_lengths=3), fresh=True)
    assert (tmp_path / "profile.json").read_text() == "precious"


def test_a_run_directory_is_a_folder(tiny_elastic_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"run_dir is .*file' is no folder"):
            run_pipeline(make_config(run_dir, tiny_elastic_dir), reporter=Stopper())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_library_that_a_late_step_needs_is_missed_early(
    tiny_elastic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pacevlm.pipeline.checks.find_spec", lambda name: None if name == "jinja2" else object())
    config = make_config(tmp_path / "run", tiny_elastic_dir)
    with pytest.raises(ConfigError, match=r"jinja2 is not installed.*pacevlm\[report\]"):
        run_pipeline(config, reporter=Stopper())
    with pytest.raises(Stopped, match="profile"):
        run_pipeline(config, "train", reporter=Stopper())


# What cannot be learned ----------------------------------------------------------------------------------------------


def write_questions(folder: Path, answer: str) -> Path:
    """A data set of 40 pictures and questions that all have one answer."""
    lines = []
    for number in range(40):
        Image.new("RGB", (24 + 2 * number, 30), (5 * number, 100, 50)).save(folder / f"{number}.png")
        question = f"Which number is the largest?{' 4' * (number % 5)}"
        lines.append({"image": f"{number}.png", "question": question, "answer": answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_with_nothing_to_learn_says_so_each_time_and_in_its_report(
    tiny_elastic_dir: Path, tmp_path: Path
) -> None:
    reference = "<b>never\x1b[2J said</b>"
    config = changed(
        make_config(tmp_path / "run", tiny_elastic_dir), data__dataset=str(write_questions(tmp_path, reference))
    )
    first, again = Recorder(), Recorder()
    run_pipeline(config, reporter=first)
    assert [step for step, _ in first.warnings] == ["lookup", "train", "evaluate"]
    texts = dict(first.warnings)
    assert "none of 4 training examples was answered right with any of 36 configurations" in texts["lookup"]
    assert "no group of rollouts in 3 training steps had unequal scores" in texts["train"]
    assert "by any policy" in texts["evaluate"]
    for step in ("lookup", "evaluate"):
        for part in ("metric", "references", "prompt", "Which number is the largest?", "never", "the answer was"):
            assert part in texts[step]
    run_pipeline(config, reporter=again)
    assert again.of("skipped") == list(STEPS)
    assert again.warnings == first.warnings
    results = json.loads((config.run_dir / "results.json").read_text())
    assert results["warnings"] == [sentence for _, sentence in first.warnings]
    report = (config.run_dir / "report.html").read_text()
    assert report.count('<p class="warning">') == 3
    assert "<b>never" not in report
    assert "\x1b" not in report
