"""Several ranks: what they give is what one process gives, and no fault of one leaves another behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, end_of, rank_environments, start_ranks
from rank_program import run_config
from stored_answers import read_answers

from pacevlm.files import load_safetensors
from pacevlm.pipeline import run_pipeline
from pacevlm.pipeline.artefacts import OUTCOMES_NAME
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.training.metrics_log import read_metrics

PROGRAM = ROOT / "tests" / "rank_program.py"

SETTINGS = ["--data.num-train", "24", "--data.num-val", "8", "--data.num-test", "6", "--lookup.num-examples", "24"]
SETTINGS += ["--profile.num-lengths", "24", "--profile.alpha", "0.3", "--train.steps", "4", "--train.batch-size", "8"]
SETTINGS += ["--train.budgets-per-example", "2", "--train.grpo.group-size", "4", "--calibrate.num-requests", "8"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_elastic_dir: Path) -> Path:
    """The run directory of one process."""
    run_dir = tmp_path_factory.mktemp("ranks") / "alone"
    run_pipeline(run_config(run_dir, tiny_elastic_dir), "train")
    return run_dir


@pytest.fixture(scope="module")
def together(alone: Path, tiny_elastic_dir: Path) -> tuple[dict[str, Any], str, Path]:
    """What two ranks found, what the second one wrote, and their run directory."""
    run_dir = alone.with_name("together")
    program = start_ranks(2, [PROGRAM, tiny_elastic_dir, run_dir, alone / "profile.json"])
    first, second = end_of(program, 120)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    return json.loads(first[1].splitlines()[-1]), second[2], run_dir


def test_two_ranks_sweep_and_measure_importance_as_one_does(together: tuple[dict[str, Any], str, Path]) -> None:
    found, _, _ = together
    assert found["same_outcomes"]
    assert found["same_importance"]
    assert found["progress"] == [[found["num_distinct"]] * 2, True]
    assert sum(found["num_rollouts"]) == found["num_distinct"]
    assert min(found["num_rollouts"]) > 0


def test_latency_tokens_of_other_ranks_have_the_same_outputs_and_gradients(
    together: tuple[dict[str, Any], str, Path],
) -> None:
    found, _, _ = together
    assert found["tokens_differ"] < 1e-5
    assert found["sent_once"] < 50_000  # the pictures were there already


def test_an_error_of_another_rank_is_raised_on_rank_0(together: tuple[dict[str, Any], str, Path]) -> None:
    kind, said = together[0]["remote_error"]
    assert kind == "IdentityError"
    assert said.startswith("rank 1 on ")
    assert said.endswith("this rank holds another model than rank 0 asks about; start again")


def test_two_ranks_train_as_one_process_does(together: tuple[dict[str, Any], str, Path], alone: Path) -> None:
    found, _, run_dir = together
    ours, theirs = (read_metrics(folder / "train" / "metrics.jsonl") for folder in (run_dir, alone))
    kept = [name for name in theirs[0] if name.startswith(("knobs/", "reward", "accuracy", "mask/", "frac_"))]
    assert len(kept) > 8
    assert [ours[0][name] for name in kept] == [theirs[0][name] for name in kept]
    weights = [load_safetensors(folder / "controller" / "controller.safetensors") for folder in (run_dir, alone)]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=1e-5)
    assert sum(step["ranks/1/num_rollouts"] for step in ours) > 0
    assert found["work"][1] > found["num_rollouts"][1]
    (step,) = [StepLog(run_dir).get("train")]
    assert step is not None
    assert [rank["num_rollouts"] > 0 for rank in step.facts["ranks"]] == [True, True]


def test_outcomes_of_several_ranks_are_one_store_without_duplicates(
    together: tuple[dict[str, Any], str, Path], alone: Path
) -> None:
    ours, theirs = (read_answers(folder / OUTCOMES_NAME) for folder in (together[2], alone))
    assert len({row[:2] for row in ours}) == len(ours)
    known = {row[:2]: row for row in theirs}
    both = [row for row in ours if row[:2] in known]
    assert len(both) > 0.8 * len(known)
    assert all(row == known[row[:2]] for row in both)


def test_only_rank_0_writes_files(together: tuple[dict[str, Any], str, Path]) -> None:
    _, wrote, run_dir = together
    assert f"wrote {os.devnull}" in wrote
    assert str(run_dir.parent) not in wrote


def test_a_rank_with_another_model_is_refused(
    alone: Path, tiny_elastic_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    settings = json.loads((checkpoint / "elastic.json").read_text())
    (checkpoint / "elastic.json").write_text(json.dumps(settings | {"removal": [2, 4, 3]}))
    program = start_ranks(2, [PROGRAM, tiny_elastic_dir, tmp_path / "run", alone / "profile.json", checkpoint])
    (code, said, _), other = end_of(program, 60)
    assert (code, other[0]) == (0, 0)
    found = json.loads(said.splitlines()[-1])
    assert found["error"] == "IdentityError"
    assert "rank 1 on" in found["message"]
    assert "loaded another model" in found["message"]


def wait_for(path: Path, num_answers: int, most_seconds: float = 60) -> None:
    until = time.monotonic() + most_seconds
    while not path.exists() or not path.stat().st_size or len(read_answers(path)) < num_answers:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_all_in_a_sentence_and_others_go_on(
    alone: Path, tiny_elastic_dir: Path, tmp_path: Path, victim: int
) -> None:
    run_dir = tmp_path / "run"
    command = ["-m", "pacevlm", "train", "--run-dir", run_dir, "--model.path", tiny_elastic_dir, *SETTINGS]
    command += ["--model.max-new-tokens", "2", "--model.vision-budgets", "1", "1", "2"]
    command += ["--profile.source", alone / "profile.json"]
    ranks = start_ranks(2, command)
    outcomes = run_dir / OUTCOMES_NAME
    try:
        wait_for(outcomes, 60)
    finally:
        ranks[victim].kill()
    killed_at = time.monotonic()
    ends = end_of(ranks, 30)
    assert time.monotonic() - killed_at < 30
    assert ends[victim][0] == -signal.SIGKILL
    assert ends[1 - victim][0] != 0 or victim == 1
    if victim == 1:
        code, _, said = ends[0]
        assert code == 2
        (sentence,) = [line for line in said.splitlines() if "error" in line]
        assert "rank 1 on" in sentence
        assert "is gone; everything that was answered is kept" in sentence
    kept = {row[:2] for row in read_answers(outcomes)}
    assert len(kept) >= 50
    if victim == 0:
        run_pipeline(load_run_config(run_dir), "train")
    else:  # under torchrun, and with another number of ranks
        environ = rank_environments(1)[0]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del environ[name]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", *map(str, command)]
        done = subprocess.run(torchrun, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "rollouts of 3 ranks" in done.stderr
    assert StepLog(run_dir).get("train") is not None
    records = [row[:2] for row in read_answers(outcomes)]
    assert kept <= set(records)
    assert len(set(records)) == len(records)


def test_a_command_without_rollouts_is_refused_on_several_ranks(tmp_path: Path) -> None:
    ends = end_of(start_ranks(2, ["-m", "pacevlm", "inspect", "embedded"]), 60)
    assert [code for code, _, _ in ends] == [2, 0]
    assert "inspect runs in one process, but 2 were started" in ends[0][2]
    assert ends[1][1:] == ("", "")
