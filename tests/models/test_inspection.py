"""An inspection says what loading would find, without reading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_gemma4 import save_gemma4
from families.tiny_qwen3_vl import save_qwen3_vl, save_qwen3_vl_moe
from families.toy_moe import save_toy
from safetensors.torch import load_file, save_file

from pacevlm.errors import CheckpointError
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.inspection import PICTURE_SIZES, inspect_checkpoint

FAMILIES = {
    "molmo": lambda folder, tiny: tiny,
    "qwen3_vl_moe": lambda folder, tiny: save_qwen3_vl_moe(folder),
    "qwen3_vl": lambda folder, tiny: save_qwen3_vl(folder),
    "gemma4": lambda folder, tiny: save_gemma4(folder),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_what_loading_finds(family: str, tiny_elastic_dir: Path, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path, tiny_elastic_dir)
    found, loaded = inspect_checkpoint(folder), ElasticModel.from_pretrained(folder)
    assert (found.model_type, found.problems) == (family, [])
    # What is stored besides parameters counts, what is tied counts once.
    weights = {weight.data_ptr(): weight for weight in loaded.adapter.model.state_dict().values()}
    assert found.num_parameters == sum(weight.numel() for weight in weights.values())
    assert found.num_bytes == (folder / "model.safetensors").stat().st_size
    assert found.stored_dtypes == {"F32": len(found.stored)}
    assert found.num_tensors == len(found.stored)
    model = found.model
    assert model is not None
    assert {weight.device.type for weight in model.adapter.model.parameters()} == {"meta"}
    assert (model.knob_space, model.vision_budgets) == (loaded.knob_space, loaded.vision_budgets)
    assert (model.order, model.max_new_tokens) == (loaded.order, loaded.max_new_tokens)
    assert found.vision == {size: loaded.vision_sizes(*size[::-1]) for size in PICTURE_SIZES}
    assert found.num_text_tokens == loaded.adapter.encode_question(found.question).num_text_tokens
    halves = {dtype: found.memory[dtype] for dtype in ("bfloat16", "float16")}
    assert set(halves.values()) == {(2 * found.num_parameters, found.memory["float32"][1] // 2)}


def test_weights_are_not_read(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    expected = inspect_checkpoint(checkpoint)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, file)
    found = inspect_checkpoint(checkpoint)
    assert (found.problems, found.stored, found.vision) == ([], expected.stored, expected.vision)


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.transformer.ln_f.weight"
    tensors["model.surplus"] = tensors.pop(name)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
    save_file(tensors, folder / "model.safetensors")


def spoil(folder: Path, name: str, **changes: Any) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentences"),
    [
        (
            spoil_weights,
            [r"1 tensors are missing \(model\.transformer\.ln_f", "belong to no part", r"lm_head.*\(5, 32\)"],
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), ["truncated or corrupt"]),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.pt"), [r"model\.pt is pickled"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["no usable MolmoE processor"]),
        (lambda folder: spoil(folder, "config.json", d_model=33), ["d_model 33"]),
        (lambda folder: spoil(folder, "elastic.json", removal=[0]), [r"elastic\.json"]),
        (lambda folder: (folder / "elastic.json").unlink(), ["run `pacevlm importance` on it"]),
    ],
    ids=["weights", "truncated", "pickled", "tokenizer", "config", "settings", "order"],
)
def test_why_a_model_does_not_run_is_said(
    checkpoint: Path, damage: Callable[[Path], Any], sentences: list[str]
) -> None:
    damage(checkpoint)
    found = inspect_checkpoint(checkpoint)
    assert len(found.problems) == len(sentences)
    for sentence, problem in zip(sentences, found.problems, strict=True):
        assert re.search(sentence, problem), problem
    with pytest.raises(CheckpointError):
        ElasticModel.from_pretrained(checkpoint)


def test_early_exit_needs_no_measured_order(checkpoint: Path) -> None:
    (checkpoint / "elastic.json").unlink()
    found = inspect_checkpoint(checkpoint, "early_exit")
    assert found.problems == []
    assert found.model is not None
    assert found.model.order.source == "early_exit"


def test_a_family_that_names_no_tensors_is_inspected_all_the_same(tmp_path: Path) -> None:
    found = inspect_checkpoint(save_toy(tmp_path))
    assert (found.problems, found.layout, found.num_tensors) == ([], None, None)
    assert found.num_parameters == sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())


def test_what_is_no_model_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model configuration"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="pacevlm runs"):
        inspect_checkpoint(tmp_path)
