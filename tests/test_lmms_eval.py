"""The model that lmms-eval finds: what pacevlm answers alone, in lmms-eval's own evaluation of a local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pacings import make_controller, make_pacing
from PIL import Image

from pacevlm.data.metrics import load_metric
from pacevlm.errors import BudgetError, CheckpointError, ConfigError, DataError, ImageError, KnobError
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.pacer import Pacer
from pacevlm.request.run import run_forced
from pacevlm.types import Example

pytest.importorskip("lmms_eval", reason="needs lmms-eval, pacevlm's extra lmms")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what lmms-eval's own libraries complain of
    from lmms_eval.api.instance import Instance

    from pacevlm.lmms_eval.model import PacedModel

NUM_EXAMPLES = 8
# Beyond every bound of `make_pacing`, one millisecond per unit of everything.
AMPLE_MS = 1e7
TASK = """
task: local_digits
dataset_path: imagefolder
dataset_kwargs: {{data_dir: {data_dir}}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 64, temperature: 0, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return ElasticModel.from_pretrained(EMBEDDED_DIR)


@pytest.fixture(scope="module")
def bundle(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pacing = tmp_path_factory.mktemp("bundle"), make_pacing(model)
    controller = make_controller(model, pacing.guardrail.estimator.fingerprint)
    num_threads = torch.get_num_threads()
    Pacer(model, controller, pacing, full_p50_ms=1e5, num_threads=num_threads).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    from pacevlm.data.digit_tasks import load_digits

    return list(load_digits("test", NUM_EXAMPLES, "crossed"))


@pytest.fixture(scope="module")
def evaluate(
    bundle: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs lmms-eval's command line on the examples; gives its results, and its record of each question in order."""
    folder = tmp_path_factory.mktemp("lmms")
    pictures = folder / "data" / "test"
    pictures.mkdir(parents=True)
    lines = []
    for number, example in enumerate(examples):
        example.image.save(pictures / f"{number}.png")
        line = {"file_name": f"{number}.png", "question": example.question, "answer": example.references[0]}
        lines.append(json.dumps(line))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local_digits.yaml").write_text(TASK.format(data_dir=folder / "data"))

    def run(model_args: str, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        out = folder / f"out-{len(list(folder.iterdir()))}"
        command = ["--model", "pacevlm", "--model_args", f"run_dir={bundle},{model_args}", "--tasks", "local_digits"]
        command += ["--include_path", str(folder / "tasks"), "--output_path", str(out), "--log_samples", *arguments]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
        ran = subprocess.run(
            [sys.executable, "-m", "lmms_eval", *command], capture_output=True, text=True, env=os.environ | offline
        )
        assert list(out.rglob("*samples*.jsonl")), ran.stdout + ran.stderr
        (results,), (samples,) = out.rglob("*results.json"), out.rglob("*samples*.jsonl")
        return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]

    return run


def test_full_knobs_are_right_where_pacevlm_alone_is(
    evaluate: Callable[..., Any], model: ElasticModel, examples: list[Example]
) -> None:
    results, samples = evaluate("knobs=high/8/16")
    alone = [run_forced(model, example.image, example.question, model.knob_space.full).answer for example in examples]
    assert [sample["doc_id"] for sample in samples] == list(range(NUM_EXAMPLES))
    assert [sample["filtered_resps"] for sample in samples] == alone
    metric = load_metric("exact_match")
    right = [metric(answer, example) for answer, example in zip(alone, examples, strict=True)]
    assert results["results"]["local_digits"]["exact_match,none"] == np.mean(right)
    assert np.mean(right) > 0
    throughput = results["throughput"]
    assert throughput["avg_share_tier_high"] == throughput["avg_share_num_blocks_16"] == 1
    assert throughput["avg_share_tier_low"] == 0
    assert "avg_share_late" not in throughput


def test_a_budget_is_recorded_request_by_request(
    evaluate: Callable[..., Any], model: ElasticModel, examples: list[Example]
) -> None:
    results, samples = evaluate(f"budget_ms={AMPLE_MS},price=5", "--gen_kwargs", "max_new_tokens=1")
    records = [sample["token_counts"][0] for sample in samples]
    for sample, record, example in zip(samples, records, examples, strict=True):
        knobs = next(knobs for knobs in model.knob_space if str(knobs) == record["knobs"])
        shorter = run_forced(model, example.image, example.question, knobs, max_new_tokens=1).answer
        assert sample["filtered_resps"] == shorter
        assert (record["budget_ms"], record["price"], record["kind"]) == (AMPLE_MS, 5, "e2e")
        assert record["budget_met"]
    throughput = results["throughput"]
    assert throughput["avg_latency_ms"] == pytest.approx(np.mean([record["measured_ms"] for record in records]))
    assert throughput["total_gen_tokens"] == sum(record["output_tokens"] for record in records)
    assert throughput["avg_share_late"] == throughput["avg_share_infeasible"] == 0
    for tier in model.knob_space.tiers:
        share = np.mean([record["knobs"].startswith(f"{tier}/") for record in records])
        assert throughput[f"avg_share_tier_{tier}"] == pytest.approx(share)


# Without the evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paced(bundle: Path) -> PacedModel:
    return PacedModel(str(bundle), knobs="low/8/16")


def ask(
    paced: PacedModel, content: Sequence[dict[str, Any]], *roles: str, times: int = 1, **settings: Any
) -> list[str]:
    messages = [{"role": role, "content": content} for role in roles or ("user",)]
    paced.task_dict = {"task": {"test": [None]}}
    arguments = ("", lambda doc: messages, settings, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", arguments, 0, metadata)
    return [result.text for result in paced.generate_until([request] * times)]


def picture() -> dict[str, Any]:
    return {"type": "image", "url": Image.new("RGB", (64, 64), "red")}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_texts_around_the_picture_are_one_question(paced: PacedModel) -> None:
    (alone,) = ask(paced, [picture(), text("How many digits are there?\nAnswer with one word.")])
    assert ask(paced, [text("How many digits are there?"), picture(), text("Answer with one word.")]) == [alone]
    assert alone


def test_answers_end_at_the_tasks_texts(paced: PacedModel) -> None:
    question = [picture(), text("How many digits are there?")]
    (whole,) = ask(paced, question, until=None)
    assert ask(paced, question, until=["?", whole[1:]], times=2) == [whole[:1]] * 2
    assert ask(paced, question, until=whole[1:]) == [whole[:1]]
    assert ask(paced, question, until=[""]) == [whole]
    assert paced.generate_until([]) == []


@pytest.mark.parametrize(
    ("content", "roles", "message"),
    [
        ([picture(), picture(), text("Which is larger?")], ["user"], "2 pictures"),
        ([text("What is two and two?")], ["user"], "0 pictures"),
        ([{"type": "video", "url": "film.mp4"}, text("Who sings?")], ["user"], "1 videos"),
        ([picture(), {"type": "audio", "url": "song.wav"}, text("Who sings?")], ["user"], "1 sounds"),
        ([picture(), text("And then?")], ["user", "assistant", "user"], "one message of a user"),
    ],
)
def test_what_is_not_one_question_about_one_picture_is_refused(
    paced: PacedModel, content: list[dict[str, Any]], roles: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ask(paced, content, *roles)


def test_a_picture_that_cannot_be_read_ends_the_evaluation(paced: PacedModel) -> None:
    with pytest.raises(ImageError, match="is a URL"):
        ask(paced, [{"type": "image", "url": "https://example.org/a.png"}, text("What is this?")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "decodes greedily; accept that with --gen_kwargs temperature=0"),
        ({"temperature": 0.0, "num_beams": 4}, "decodes greedily"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_greedy_decoding_cannot_give_is_refused(paced: PacedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(paced, [picture(), text("What is this?")], **settings)


def test_what_is_no_answer_to_one_question_is_not_supported(paced: PacedModel) -> None:
    with pytest.raises(NotImplementedError, match="no likelihoods"):
        paced.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one question"):
        paced.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "need budget_ms, price or both"),
        ({"budget_ms": 80, "knobs": "low/4/12"}, ConfigError, "or else knobs alone"),
        ({"budget_ms": 0}, BudgetError, "positive"),
        ({"price": -1}, ConfigError, "price is -1"),
        ({"knobs": "low"}, KnobError, "tier/top_k/num_blocks"),
        ({"knobs": "low/5/16"}, KnobError, "not in this space"),
        ({"budget_ms": 80, "budget_kind": "ttft"}, ConfigError, "are of the kind 'e2e'"),
        ({"budget_ms": 80, "budget_kind": "all"}, ConfigError, "budget_kind is 'all'"),
        ({"budget_ms": 80, "batch_size": "auto"}, ConfigError, "a latency is that of one request"),
        ({"budget_ms": 80, "run_dir": "/nowhere"}, CheckpointError, "there is no bundle.json in /nowhere"),
    ],
)
def test_model_arguments_that_cannot_be_used_are_refused(
    bundle: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PacedModel(**{"run_dir": str(bundle), **arguments})


def test_a_price_alone_has_a_budget_that_hardly_binds(bundle: Path) -> None:
    paced = PacedModel(str(bundle), price=5)
    assert (paced.price, paced.budget_ms) == (5, 10 * paced.pacer.full_p50_ms)


def test_several_processes_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start one process"):
        PacedModel(str(bundle), budget_ms=80)
