"""What is Gemma 4's alone: soft tokens, windows, pictures seen both ways, dense blocks, sizes that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import device_exists
from decoding import generate_with_logits
from families.reference import transformers_request
from families.tiny_gemma4 import save_gemma4
from PIL import Image
from pretended_device import DEVICE

from pacevlm.errors import CheckpointError, ConfigError, QuestionError
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.types import Example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma4(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ElasticModel:
    return ElasticModel.from_pretrained(folder)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def logits_of(model: ElasticModel, example: Example, tier: str = "low") -> torch.Tensor:
    adapter = model.adapter
    prepared = adapter.prepare(example.image, adapter.encode_question(example.question), model.vision_budgets[tier])
    prompt = adapter.embed(prepared, adapter.encode_vision([prepared])[0])
    prefix = model.decoder.prefix([prompt])
    return generate_with_logits(model.decoder, prefix, [3], [6], 1)[1][0]


def test_budgets_are_those_of_the_image_processor(folder: Path, model: ElasticModel, tmp_path: Path) -> None:
    assert list(model.adapter.default_vision_budgets.values()) == [70, 140, 280, 560, 1120]
    for budget in model.adapter.default_vision_budgets.values():
        assert model.adapter.vision_sizes(300, 300, budget).num_image_tokens <= budget
    with pytest.raises(ConfigError, match=r"one of \[70, 140, 280, 560, 1120\]"):
        ElasticModel.from_pretrained(folder, vision_budgets=(70, 100, 280))
    (copy := Path(shutil.copytree(folder, tmp_path / "copy")) / "elastic.json").unlink()
    suited = ElasticModel.from_pretrained(copy.parent, block_order="early_exit").knob_space
    assert (suited.tiers, suited.top_ks) == (("lowest", "low", "medium", "high", "highest"), (2, 3))


def test_windows_and_seeing_both_ways_matter(
    model: ElasticModel, law_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(model, law_examples[3])
    assert max(model.adapter.windows.values()) < 70
    with monkeypatch.context() as patched:
        patched.setattr(model.adapter, "windows", {})
        assert not torch.allclose(logits_of(model, law_examples[3]), expected, atol=1e-3)
    monkeypatch.setattr(model.adapter, "sees_pictures_both_ways", False)
    assert not torch.allclose(logits_of(model, law_examples[3]), expected, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        {"enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None},
        {"sliding_window": 4096, "final_logit_softcapping": None},
        {"use_bidirectional_attention": None, "attention_k_eq_v": False, "num_global_key_value_heads": None},
    ],
    ids=["dense", "wide_window", "causal"],
)
def test_other_configurations_generate_what_transformers_does(
    tmp_path: Path, law_examples: list[Example], text: dict[str, Any]
) -> None:
    model = ElasticModel.from_pretrained(save_gemma4(tmp_path, text=text))
    batch, prompt = transformers_request(model, law_examples[1], "low", True)
    tokens = model.decoder.generate(model.decoder.prefix([prompt]), [model.trained_top_k], [6], 6)[0]
    ends, pad = sorted(model.adapter.end_token_ids), model.adapter.tokenizer.pad_token_id
    found = model.adapter.model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=pad
    )
    assert found[0, batch["input_ids"].shape[1] :].tolist() == tokens


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ({"num_kv_shared_layers": 2, "attention_k_eq_v": False}, "2 layers that share caches"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}, "8 numbers per layer"),
        ({"use_bidirectional_attention": "all"}, "all tokens see each other"),
    ],
)
def test_what_is_not_run_is_refused(tmp_path: Path, folder: Path, text: dict[str, Any], sentence: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= text
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence):
        ElasticModel.from_pretrained(copy)


@pytest.mark.parametrize("question", ["?", "¿Qué número? 数字 🙂", "\x00\x07", "<|image|> 3", "a<turn|>b"])
def test_unusual_questions_are_answered(model: ElasticModel, question: str) -> None:
    for has_image in (True, False):
        assert model.adapter.image_id not in model.adapter.encode_question(question, has_image).text_ids
    run_forced(model, picture(40, 40), question, model.knob_space.full)
    run_forced(model, None, question, model.knob_space.cheapest)


@pytest.mark.parametrize("question", ["", " \n", "word " * 20_000, "\ud800", None])
def test_unusable_questions_are_refused(model: ElasticModel, question: Any) -> None:
    with pytest.raises(QuestionError):
        run_forced(model, picture(24, 24), question, model.knob_space.full)


def test_half_precision(folder: Path) -> None:
    half = ElasticModel.from_pretrained(folder, dtype=torch.bfloat16)
    for knobs in (half.knob_space.full, half.knob_space.cheapest):
        run_forced(half, picture(50, 40), "How many?", knobs)


def test_another_device_answers_the_same(folder: Path, model: ElasticModel) -> None:
    with device_exists(DEVICE.type):
        there = ElasticModel.from_pretrained(folder, device=DEVICE.type)
        for knobs in (there.knob_space.full, there.knob_space.cheapest):
            found = run_forced(there, picture(50, 40), "How many?", knobs)
            assert found.token_ids == run_forced(model, picture(50, 40), "How many?", knobs).token_ids


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_files_are_refused_or_make_no_difference(
    folder: Path, model: ElasticModel, tmp_path: Path, how: str
) -> None:
    expected = run_forced(model, picture(60, 40), "How many?", model.knob_space.full).token_ids
    for file in sorted(folder.iterdir()):
        copy = Path(shutil.copytree(folder, tmp_path / file.name))
        content = file.read_bytes()
        (copy / file.name).unlink()
        if how == "truncated":
            (copy / file.name).write_bytes(content[: len(content) // 2])
        try:
            other = ElasticModel.from_pretrained(
                copy, knob_space=model.knob_space, vision_budgets=model.vision_budgets, max_new_tokens=6
            )
        except CheckpointError:
            continue
        assert run_forced(other, picture(60, 40), "How many?", model.knob_space.full).token_ids == expected
        assert other.adapter.end_token_ids == model.adapter.end_token_ids


def test_another_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_kernel_size": 2}))
    with pytest.raises(CheckpointError, match="pooling_kernel_size 2, but the model takes 3"):
        ElasticModel.from_pretrained(copy)
