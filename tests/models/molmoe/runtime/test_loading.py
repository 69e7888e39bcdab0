"""Damaged, incomplete and swapped checkpoint files: a clear refusal, or the right answer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pacevlm.errors import CheckpointError
from pacevlm.knobs import KnobSpace
from pacevlm.models.elastic import ElasticModel, read_elastic_settings
from pacevlm.models.molmoe.tokenization import build_tokenizer
from pacevlm.request.run import run_forced

TINY_SPACE = KnobSpace(("low", "medium", "high"), (2, 3, 4), (3, 4, 5, 6))
NOT_NEEDED = ("tokenizer_config.json", "generation_config.json")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FILES = (
    "config.json",
    "model.safetensors",
    "elastic.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"zero_bytes": b"", "truncated": content[: len(content) // 2], "other": b"[1, 2]"}[how])


@pytest.mark.parametrize("how", ["missing", "zero_bytes", "truncated", "other"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_makes_no_difference(
    checkpoint: Path, tiny_elastic: ElasticModel, name: str, how: str
) -> None:
    assert sorted(FILES) == sorted(file.name for file in checkpoint.iterdir())
    damage(checkpoint / name, how)
    options: dict[str, Any] = {
        "knob_space": TINY_SPACE,
        "vision_budgets": tiny_elastic.vision_budgets,
        "max_new_tokens": 6,
    }
    if name not in NOT_NEEDED:
        with pytest.raises(CheckpointError, match=str(checkpoint)):
            ElasticModel.from_pretrained(checkpoint, **options)
        return
    try:
        model = ElasticModel.from_pretrained(checkpoint, **options)
    except CheckpointError:
        return
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    expected = run_forced(tiny_elastic, image, "How many?", TINY_SPACE.full)
    found = run_forced(model, image, "How many?", TINY_SPACE.full)
    assert dataclasses.replace(found, times=expected.times) == expected


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"surprise": 1}',
        '{"removal": 4}',
        '{"removal": ["a"]}',
        '{"removal": [4, 4, 2]}',
        '{"removal": [0, 4, 2]}',
        '{"removal": [4, 2, 9]}',
        '{"vision_budgets": [1, 2, 4]}',
        '{"vision_budgets": {"low": 0, "medium": 2, "high": 4}}',
        '{"vision_budgets": {"low": "one", "medium": 2, "high": 4}}',
        '{"max_new_tokens": "many"}',
        '{"max_new_tokens": 0}',
        '{"knob_space": 5}',
        '{"knob_space": {"tiers": ["low"]}}',
        '{"knob_space": {"tiers": 5, "top_ks": [1], "num_blocks": [6]}}',
        '{"knob_space": {"tiers": ["low"], "top_ks": ["a"], "num_blocks": [6]}}',
    ],
)
def test_malformed_settings_are_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "elastic.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"elastic\.json"):
        ElasticModel.from_pretrained(checkpoint, knob_space=TINY_SPACE)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 64},
        {"d_model": "wide"},
        {"d_model": 0},
        {"n_layers": 4},
        {"n_layers": 8},
        {"n_heads": 5},
        {"moe_num_experts": 16},
        {"moe_top_k": 9},
        {"embedding_size": 400},
        {"vision_backbone": 3},
        {"vit_layers": [7]},
        {"model_type": "llava"},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(checkpoint: Path, changes: dict[str, Any]) -> None:
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(CheckpointError, match="model"):
        ElasticModel.from_pretrained(checkpoint)


def test_swapped_files_are_refused(checkpoint: Path, save_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", crop_px=32, n_layers=5)
    for name in ("model.safetensors", "config.json", "processor_config.json"):
        kept = (checkpoint / name).read_bytes()
        shutil.copy(other / name, checkpoint / name)
        with pytest.raises(CheckpointError, match=r"swapped|belong|loadable"):
            ElasticModel.from_pretrained(checkpoint)
        (checkpoint / name).write_bytes(kept)
    ElasticModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "changes", [{"patch_size": 8}, {"margins": [0, 2]}, {"pool": 1}, {"pool": 5}, {"max_crops": 0}]
)
def test_a_processor_of_another_geometry_is_refused(checkpoint: Path, changes: dict[str, Any]) -> None:
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"] |= changes
    (checkpoint / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        ElasticModel.from_pretrained(checkpoint)


def test_a_larger_tokenizer_is_refused(checkpoint: Path) -> None:
    texts = ["".join(np.random.default_rng(i).choice(list("abcdefgh"), 6)) for i in range(400)]
    build_tokenizer(texts, 500).save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match="tokenizer"):
        ElasticModel.from_pretrained(checkpoint)


def test_pickled_and_absent_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model directory"):
        ElasticModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no model directory"):
        ElasticModel.from_pretrained(checkpoint / "config.json")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        ElasticModel.from_pretrained(checkpoint)


def test_settings_of_a_directory_without_any_are_empty(tmp_path: Path) -> None:
    assert read_elastic_settings(tmp_path) == {}
