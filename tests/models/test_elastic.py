"""Elastic models: loading and refusing, sizes known beforehand, identity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pacevlm.errors import CheckpointError, ConfigError, ImageError, KnobError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.elastic import ElasticModel, model_fingerprint, write_elastic_settings
from pacevlm.types import Example

QUESTION = "Which number is the largest?"
TINY_SPACE = KnobSpace(("low", "medium", "high"), (2, 3, 4), (3, 4, 5, 6))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner_knobs(space: KnobSpace) -> list[Knobs]:
    return [space.cheapest, space[len(space) // 2], space.full]


# Looks


def test_sizes_are_known_before_encoding(law_model: ElasticModel, law_examples: list[Example]) -> None:
    for example in law_examples:
        view = law_model.view(example.image, example.question)
        assert view.image_size == (example.image.height, example.image.width)
        assert view.sizes.num_pixels == example.image.height * example.image.width
        assert view.question_embedding.shape == (law_model.d_model,)
        assert view.question_embedding.isfinite().all()
        prompt = law_model.adapter.encode_question(example.question)
        for tier, sizes in zip(law_model.knob_space.tiers, view.sizes.vision, strict=True):
            prepared = law_model.adapter.prepare(example.image, prompt, law_model.vision_budgets[tier])
            assert prepared.vision_sizes == sizes
            assert prepared.input_ids.shape[0] == sizes.num_image_tokens + view.sizes.num_text_tokens


def is_taken(model: ElasticModel, budget: int) -> bool:
    """Whether the family takes a vision budget; some have a list of those that they were trained with."""
    try:
        model.adapter.vision_sizes(100, 100, budget)
    except ConfigError:
        return False
    return True


def test_a_dearer_tier_never_makes_less_of_a_picture(law_model: ElasticModel) -> None:
    rng, adapter = np.random.default_rng(0), law_model.adapter
    most = max(law_model.vision_budgets.values())
    budgets = sorted({*law_model.vision_budgets.values(), *rng.integers(1, most + 1, 12).tolist()})
    budgets = [budget for budget in budgets if is_taken(law_model, budget)]
    for _ in range(150):
        height, width = (int(2000 ** rng.random()) for _ in range(2))
        try:
            sizes = [adapter.vision_sizes(height, width, budget) for budget in budgets]
        except ImageError:
            continue
        for name in ("num_units", "num_image_tokens", "num_unit_pairs"):
            values = [getattr(one, name) for one in sizes]
            assert values == sorted(values), (height, width)
        for one, budget in zip(sizes, budgets, strict=True):
            assert one.num_image_tokens <= adapter.max_image_tokens(budget)


def test_view_touches_no_pixel_reader_of_the_model(tiny_elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the image was prepared or encoded")

    monkeypatch.setattr(tiny_elastic.adapter, "prepare", refuse)
    monkeypatch.setattr(tiny_elastic.adapter, "encode_vision", refuse)
    tiny_elastic.view(picture(40, 40), QUESTION)


def test_question_embedding_depends_on_the_question_alone(tiny_elastic: ElasticModel) -> None:
    one = tiny_elastic.view(picture(40, 40), QUESTION).question_embedding
    same = tiny_elastic.view(picture(24, 90, seed=1), QUESTION).question_embedding
    other = tiny_elastic.view(picture(40, 40), "How many?").question_embedding
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


# Construction


def test_values_that_the_model_lacks_are_refused(tiny_elastic_dir: Path) -> None:
    def load(top_ks: tuple[int, ...] = (4,), num_blocks: tuple[int, ...] = (6,), **options: Any) -> ElasticModel:
        space = KnobSpace(options.pop("tiers", ("low", "high")), top_ks, num_blocks)
        return ElasticModel.from_pretrained(tiny_elastic_dir, knob_space=space, **options)

    assert load((8,), (3, 6)).knob_space.full == Knobs("high", 8, 6)
    with pytest.raises(KnobError, match="8 experts"):
        load((4, 9))
    with pytest.raises(KnobError, match=r"1\.\.6"):
        load(num_blocks=(6, 7))
    with pytest.raises(KnobError, match="this order knows 3 to 6"):
        load(num_blocks=(2, 6))
    assert load(num_blocks=(1, 6), block_order="early_exit").order.kept(1) == (0,)
    with pytest.raises(KnobError, match="huge"):
        load(tiers=("low", "huge"))
    with pytest.raises(KnobError, match="must not fall"):
        load(tiers=("high", "low"))
    with pytest.raises(KnobError, match=r"drop blocks \[2\]"):
        load(num_blocks=(4, 6), stage2_after=3)
    with pytest.raises(KnobError, match=r"3\.\.6"):
        load(num_blocks=(2, 6), stage2_after=3, block_order="early_exit")
    for stage2_after in (0, 6):
        with pytest.raises(KnobError, match="stage2_after"):
            load(stage2_after=stage2_after)
    with pytest.raises(ConfigError, match="block_order"):
        load(block_order="best")
    for limits in ({"low": 0, "high": 4}, {"low": 1, "high": 2.5}):
        with pytest.raises(ConfigError, match="vision budget"):
            load(vision_budgets=limits)
    with pytest.raises(ConfigError, match="one number for each of the tiers"):
        load(vision_budgets=(1, 2, 3))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        load(max_new_tokens=0)


def test_an_order_of_another_model_is_refused(tiny_elastic: ElasticModel) -> None:
    with pytest.raises(KnobError, match="16 blocks"):
        ElasticModel(
            tiny_elastic.adapter, TINY_SPACE, tiny_elastic.vision_budgets, BlockOrder(16, tuple(range(15, 1, -1))), "x"
        )


def test_settings_come_from_the_checkpoint(tiny_elastic: ElasticModel) -> None:
    assert tiny_elastic.knob_space == TINY_SPACE
    assert tiny_elastic.order.removal == (4, 2, 3)
    assert tiny_elastic.vision_budgets == {"low": 1, "medium": 2, "high": 4}
    assert tiny_elastic.max_new_tokens == 6
    assert tiny_elastic.trained_top_k == 4


def test_a_checkpoint_without_a_measured_order_says_what_to_do(checkpoint: Path) -> None:
    (checkpoint / "elastic.json").unlink()
    limits = {"low": 1, "medium": 2, "high": 4}
    with pytest.raises(CheckpointError, match=r"importance.*early_exit"):
        ElasticModel.from_pretrained(checkpoint, knob_space=TINY_SPACE, vision_budgets=limits)
    model = ElasticModel.from_pretrained(
        checkpoint, knob_space=TINY_SPACE, vision_budgets=limits, block_order="early_exit"
    )
    assert model.order.kept(3) == (0, 1, 2)


# Identity


def test_identity_names_weights_and_settings(
    checkpoint: Path,
    tiny_elastic_dir: Path,
    tiny_elastic: ElasticModel,
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def load(folder: Path = checkpoint, **options: Any) -> str:
        return ElasticModel.from_pretrained(folder, **options).identity

    same = load()
    assert same == tiny_elastic.identity  # wherever the files are
    others = {
        "dtype": load(dtype=torch.bfloat16),
        "tiers": load(vision_budgets={"low": 1, "medium": 3, "high": 4}),
        "order": load(block_order="early_exit"),
        "stage2_after": load(stage2_after=2),
        "answer length": load(max_new_tokens=5),
        "other weights": load(save_checkpoint(tmp_path / "other", seed=2)),
    }
    write_elastic_settings(checkpoint, removal=[2, 4, 3])
    others["other order"] = load()
    shutil.copy(tiny_elastic_dir / "elastic.json", checkpoint)
    assert load() == same

    weights = load_file(checkpoint / "model.safetensors")
    name = "model.transformer.blocks.3.attn.att_proj.weight"
    weights[name][0, 0] += 1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    others["one weight"] = load()
    weights[name][0, 0] -= 1
    processor = json.loads((checkpoint / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (checkpoint / "processor_config.json").write_text(json.dumps(processor))
    others["normalisation"] = load()
    assert len({same, *others.values()}) == 1 + len(others), others


def test_every_byte_of_the_weights_counts(tmp_path: Path) -> None:
    """Also far from the ends of a file, which are all that a glance at a large one shows."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"weight": torch.zeros(2 << 20)}, file)
    save_file({"bias": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = model_fingerprint(tmp_path, {"dtype": "float32"})
    seen = {before, model_fingerprint(tmp_path, {"dtype": "bfloat16"})}
    content = file.read_bytes()
    for place in (len(content) // 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
        seen.add(model_fingerprint(tmp_path, {"dtype": "float32"}))
    file.write_bytes(content)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{ }")
        seen.add(model_fingerprint(tmp_path, {"dtype": "float32"}))
        (tmp_path / name).write_text("{}")
    assert len(seen) == 7
    assert model_fingerprint(tmp_path, {"dtype": "float32"}) == before
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        model_fingerprint(tmp_path, {})
