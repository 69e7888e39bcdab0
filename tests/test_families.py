"""What every family on transformers' classes owes besides the laws of `tests/models/test_decoder.py`."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_gemma4, tiny_qwen3_vl
from families.reference import transformers_request
from families.tiny_gemma4 import save_gemma4
from families.tiny_qwen3_vl import save_qwen3_vl, save_qwen3_vl_moe
from PIL import Image

from pacevlm.cli import main
from pacevlm.errors import CheckpointError
from pacevlm.knobs import Knobs
from pacevlm.models import registry
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.registry import find_family
from pacevlm.types import Example

FAMILIES: dict[str, tuple[Callable[..., Path], Any]] = {
    "gemma4": (save_gemma4, tiny_gemma4),
    "qwen3_vl": (save_qwen3_vl, tiny_qwen3_vl),
    "qwen3_vl_moe": (save_qwen3_vl_moe, tiny_qwen3_vl),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[family][0](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def model(folder: Path) -> ElasticModel:
    return ElasticModel.from_pretrained(folder)


def processor_count(model: ElasticModel, image: Image.Image, budget: int) -> int:
    """Image tokens as the family's own image processor counts them."""
    processor = model.adapter.image_processor
    if hasattr(processor, "pooling_kernel_size"):
        found = processor(images=image, max_soft_tokens=budget, return_tensors="pt")
        return int(torch.as_tensor(found["num_soft_tokens_per_image"])[0])
    least, most = model.adapter._pixel_limits(image.height, image.width, budget)
    found = processor(images=image, size={"shortest_edge": least, "longest_edge": most}, return_tensors="pt")
    return int(found["image_grid_thw"].prod()) // processor.merge_size**2


def test_image_tokens_follow_from_the_size_alone(model: ElasticModel) -> None:
    rng, adapter = random.Random(0), model.adapter
    prompt, budgets, num_sizes = adapter.encode_question("?"), list(model.vision_budgets.values()), 0
    while num_sizes < 200:
        height, width = round(500 ** rng.random()), round(500 ** rng.random())
        if max(height, width) > 200 * min(height, width):
            continue
        num_sizes += 1
        image, budget = Image.new("RGB", (width, height)), rng.choice(budgets)
        sizes = adapter.vision_sizes(height, width, budget)
        assert sizes.num_image_tokens == processor_count(model, image, budget), (height, width, budget)
        prepared = adapter.prepare(image, prompt, budget)
        assert len(prepared.patches) == sizes.num_units
        assert len(prepared.input_ids) == prompt.num_text_tokens + sizes.num_image_tokens
        assert sizes.num_image_tokens <= adapter.max_image_tokens(budget)


def test_a_dearer_budget_never_makes_fewer_tokens(model: ElasticModel) -> None:
    rng = random.Random(1)
    for _ in range(300):
        height, width = round(3000 ** rng.random()), round(3000 ** rng.random())
        if max(height, width) <= 200 * min(height, width):
            budgets = sorted({*model.vision_budgets.values(), *model.adapter.default_vision_budgets.values()})
            counts = [model.adapter.vision_sizes(height, width, budget).num_image_tokens for budget in budgets]
            assert counts == sorted(counts), (height, width)


def test_lower_knobs_generate_what_edited_modules_generate(
    family: str, model: ElasticModel, law_examples: list[Example]
) -> None:
    changed, space, adapter = FAMILIES[family][1].changed, model.knob_space, model.adapter
    for example, top_k, num_blocks in zip(law_examples, (*space.top_ks, space.top_ks[0]), (3, 4, 5, 6), strict=False):
        knobs = Knobs(space.tiers[0], top_k, num_blocks)
        batch, prompt = transformers_request(model, example, knobs.tier, True)
        tokens = model.decoder.generate(model.decoder.prefix([prompt]), [top_k], [num_blocks], 6)[0]
        removed = set(range(adapter.num_blocks)) - set(model.order.kept(num_blocks))
        with changed(adapter, removed, [model.trained_top_k] + [top_k] * (adapter.num_blocks - 1)):
            found = adapter.model.generate(
                **batch,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=sorted(adapter.end_token_ids),
                pad_token_id=adapter.tokenizer.pad_token_id,
            )
        assert found[0, batch["input_ids"].shape[1] :].tolist() == tokens


def test_a_run_from_the_command_line_finds_the_family(
    family: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Figures know no family, and take as long as all the rest.
    monkeypatch.setattr("pacevlm.pipeline.outputs.draw_outputs", lambda *_, **__: None)
    settings = {
        **{"run-dir": tmp_path / "run", "model.path": folder, "model.max-new-tokens": 2, "profile.num-requests": 4},
        **{"model.tiers": "low medium", "model.num-blocks": "5 6"},
        **{"data.num-train": 24, "data.num-val": 8, "data.num-test": 4, "profile.num-samples": 16},
        **{"profile.repeats": 1, "profile.max-warmup": 1, "profile.num-lengths": 24, "profile.alpha": 0.3},
        **{"profile.max-megapixels": 0.02, "lookup.num-examples": 2, "train.steps": 1, "train.batch-size": 4},
        **{"train.grpo.group-size": 2, "calibrate.num-requests": 6, "evaluate.budgets": "0.8 1.2"},
        **{"evaluate.num-timed": 1, "evaluate.num-warmup": 0},
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split(" "))]
    assert [main([command, *words]) for command in ("profile", "train", "evaluate")] == [0, 0, 0]
    assert (tmp_path / "run" / "results.json").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == family


def test_every_family_of_the_package_is_in_this_transformers() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    for model_type, module in registry._FAMILIES.items():
        if isinstance(module, str):
            assert importlib.import_module(module).FAMILY
            assert f"`{model_type}`" in page


def test_a_family_that_transformers_lacks_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking.py").write_text("from transformers import Gemma9ForConditionalGeneration\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_FAMILIES", {**registry._FAMILIES, "gemma9": "lacking", "broken": "broken"})
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma9"}))
    with pytest.raises(CheckpointError, match=r"'gemma9' are run on classes .* lacks .*docs/families\.md"):
        find_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma4_unified"}))
    with pytest.raises(CheckpointError, match=r"'gemma4_unified'; pacevlm runs .*docs/families\.md"):
        find_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "broken"}))
    with pytest.raises(ModuleNotFoundError):
        find_family(tmp_path)


def test_pictures_encoded_together_are_what_they_are_alone(model: ElasticModel) -> None:
    adapter, budgets, rng = model.adapter, list(model.vision_budgets.values()), np.random.default_rng(0)
    prompt, sides = adapter.encode_question("?"), ((24, 24), (90, 40), (33, 70))
    images = [Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]
    requests = [adapter.prepare(image, prompt, budget) for image, budget in zip(images, budgets, strict=True)]
    for request, together in zip(requests, adapter.encode_vision(requests), strict=True):
        alone = adapter.encode_vision([request])[0]
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
