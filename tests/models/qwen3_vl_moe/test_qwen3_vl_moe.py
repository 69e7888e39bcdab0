"""What laws do not ask of every family: odd pictures and questions, damaged files, dense layers, half precision."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.tiny_qwen3_vl import save_qwen3_vl_moe
from PIL import Image

from pacevlm.errors import CheckpointError, ImageError, QuestionError
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.questions import encode_text
from pacevlm.request.run import run_forced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_vl_moe(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ElasticModel:
    return ElasticModel.from_pretrained(folder)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_sizes_of_any_picture_are_known(model: ElasticModel) -> None:
    rng, adapter = random.Random(0), model.adapter
    prompt = adapter.encode_question("?")
    sides = [(1, 1), (3, 3), (3, 50), (1, 3), (3, 1), (2, 400), (400, 2), (1, 200)]
    sides += [(int(600 ** rng.random()), int(600 ** rng.random())) for _ in range(20)]
    for height, width in sides:
        if max(height, width) > 200 * min(height, width):
            continue
        for budget in (1, 64, 200, 256, 576, 1024, 5000):
            sizes = adapter.vision_sizes(height, width, budget)
            prepared = adapter.prepare(picture(height, width), prompt, budget)
            assert prepared.patches.shape[0] == sizes.num_units == int(prepared.grid.prod()), (height, width, budget)
            assert int(prepared.is_image.sum()) == sizes.num_image_tokens <= adapter.max_image_tokens(budget)


def test_a_dearer_budget_never_makes_fewer_tokens(model: ElasticModel) -> None:
    rng = random.Random(1)
    for _ in range(300):
        height, width = int(2000 ** rng.random()), int(2000 ** rng.random())
        if max(height, width) <= 200 * min(height, width):
            counts = [model.adapter.vision_sizes(height, width, b).num_units for b in range(1, 3000, 37)]
            assert counts == sorted(counts), (height, width)


@pytest.mark.parametrize("size", [(1, 201), (4000, 1)])
def test_long_pictures_are_refused(model: ElasticModel, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        run_forced(model, picture(*size), "?", model.knob_space.full)


@pytest.mark.parametrize("question", ["", "   \n\t ", "x" * 100_000, "word " * 20_000, "\ud800", None, 7, b"bytes"])
def test_unusable_questions_are_refused(model: ElasticModel, question: Any) -> None:
    with pytest.raises(QuestionError):
        run_forced(model, picture(24, 24), question, model.knob_space.full)
    with pytest.raises(QuestionError):
        model.view(picture(24, 24), question)


@pytest.mark.parametrize("question", ["?", "¿Qué número? 数字 🙂", "\x00\x07", "<|image_pad|> 3", "a<|im_end|>b"])
def test_unusual_questions_are_answered(model: ElasticModel, question: str) -> None:
    assert model.adapter.image_id not in model.adapter.encode_question(question).text_ids
    run_forced(model, picture(40, 40), question, model.knob_space.full)
    assert (
        model.adapter.decode(encode_text(model.adapter.tokenizer, question, split_special_tokens=True))
        == question.strip()
    )


def test_pictures_encoded_together_are_what_they_are_alone(model: ElasticModel) -> None:
    adapter = model.adapter
    prompt = adapter.encode_question("?")
    requests = [adapter.prepare(picture(h, w), prompt, 1024) for h, w in ((24, 24), (90, 40), (33, 70))]
    for request, together in zip(requests, adapter.encode_vision(requests), strict=True):
        torch.testing.assert_close(together, adapter.encode_vision([request])[0], atol=1e-5, rtol=1e-5)


def test_layers_without_experts_run(tmp_path: Path) -> None:
    model = ElasticModel.from_pretrained(save_qwen3_vl_moe(tmp_path, text={"mlp_only_layers": [1, 5]}))
    for knobs in (model.knob_space.full, model.knob_space.cheapest):
        assert run_forced(model, picture(50, 40), "How many?", knobs).num_output_tokens > 0


def test_half_precision(folder: Path, model: ElasticModel) -> None:
    half = ElasticModel.from_pretrained(folder, dtype=torch.bfloat16)
    for knobs in (half.knob_space.full, half.knob_space.cheapest):
        run_forced(half, picture(50, 40), "How many?", knobs)


@pytest.mark.parametrize("how", ["missing", "zero_bytes", "truncated", "other"])
def test_damaged_files_are_refused_or_make_no_difference(
    folder: Path, model: ElasticModel, tmp_path: Path, how: str
) -> None:
    answered, silent = [], []
    expected = run_forced(model, picture(60, 40), "How many?", model.knob_space.full).token_ids
    for file in sorted(folder.iterdir()):
        copy = Path(shutil.copytree(folder, tmp_path / file.name))
        content = file.read_bytes()
        if how == "missing":
            (copy / file.name).unlink()
        else:
            new = {"zero_bytes": b"", "truncated": content[: len(content) // 2], "other": b"[1, 2]"}[how]
            (copy / file.name).write_bytes(new)
        try:
            other = ElasticModel.from_pretrained(
                copy,
                knob_space=model.knob_space,
                vision_budgets=model.vision_budgets,
                max_new_tokens=6,
            )
        except CheckpointError:
            continue
        answered.append(file.name)
        found = run_forced(other, picture(60, 40), "How many?", model.knob_space.full).token_ids
        if (found, other.adapter.end_token_ids) != (expected, model.adapter.end_token_ids):
            silent.append(file.name)
    assert not silent


def test_what_ends_an_answer_is_part_of_the_identity(folder: Path, model: ElasticModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7]}))
    other = ElasticModel.from_pretrained(copy)
    assert other.adapter.end_token_ids != model.adapter.end_token_ids
    assert other.identity != model.identity
