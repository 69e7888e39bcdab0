"""Families are found by model_type; what is theirs comes from their adapters alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_qwen3_vl import save_qwen3_vl_moe
from families.toy_moe import ToyAdapter, load_toy, save_toy

from pacevlm.errors import CheckpointError, ConfigError, KnobError
from pacevlm.evaluation.importance import measure_importance
from pacevlm.knobs import KnobSpace
from pacevlm.models import registry
from pacevlm.models.elastic import ElasticModel, read_knob_space
from pacevlm.models.registry import load_adapter, register_family
from pacevlm.types import Example


def without_settings(folder: Path) -> Path:
    (folder / "elastic.json").unlink()
    return folder


def test_a_family_is_found_by_its_model_type(tmp_path: Path, tiny_elastic_dir: Path) -> None:
    device, dtype = torch.device("cpu"), torch.float32
    assert isinstance(load_adapter(save_toy(tmp_path / "toy"), device, dtype), ToyAdapter)
    assert not isinstance(load_adapter(tiny_elastic_dir, device, dtype), ToyAdapter)
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    for model_type in ("llama", None, 3, ["toy"]):
        (tmp_path / "toy" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(CheckpointError, match=r"pacevlm runs .*'molmo'"):
            load_adapter(tmp_path / "toy", device, dtype)
    (tmp_path / "toy" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="model of type None"):
        load_adapter(tmp_path / "toy", device, dtype)


def test_knobs_that_nobody_gave_suit_the_family(tmp_path: Path) -> None:
    # A dense model has no experts to choose from: knob 2 has one value, and nothing else changes.
    dense = ElasticModel.from_pretrained(
        without_settings(save_toy(tmp_path / "dense", "dense")), block_order="early_exit"
    )
    assert dense.knob_space == KnobSpace(("low", "medium", "high"), (1,), (5, 6))
    assert dense.vision_budgets == {"low": 4, "medium": 9, "high": 16}
    toy = ElasticModel.from_pretrained(without_settings(save_toy(tmp_path / "toy")), block_order="early_exit")
    assert toy.knob_space == KnobSpace(("low", "medium", "high"), (2, 3), (5, 6))
    fewer = ElasticModel.from_pretrained(
        tmp_path / "toy",
        knob_space={"tiers": ("low", "high"), "num_blocks": (4, 6)},
        vision_budgets=(1, 9),
        block_order="early_exit",
    )
    assert fewer.knob_space == KnobSpace(("low", "high"), (2, 3), (4, 6))
    assert fewer.vision_budgets == {"low": 1, "high": 9}
    with pytest.raises(KnobError, match="1 experts per block"):
        ElasticModel.from_pretrained(tmp_path / "dense", knob_space={"top_ks": (1, 2)}, block_order="early_exit")


def test_defaults_of_the_reference_model_follow_from_its_sizes() -> None:
    assert KnobSpace.for_model(("low", "medium", "high"), 8, 16) == KnobSpace()


def test_a_knob_space_needs_no_weights(tmp_path: Path, tiny_elastic_dir: Path) -> None:
    for folder in (save_qwen3_vl_moe(tmp_path / "qwen"), Path(shutil.copytree(tiny_elastic_dir, tmp_path / "molmo"))):
        for wanted in ({}, {"num_blocks": (5, 6)}):
            model = ElasticModel.from_pretrained(folder, knob_space=wanted)
            for weights in () if wanted else folder.glob("*.safetensors"):
                weights.rename(tmp_path / weights.name)
            assert read_knob_space(folder, wanted) == model.knob_space
            for weights in tmp_path.glob("*.safetensors"):
                weights.rename(folder / weights.name)
        for content in ("[]", "{}", '{"model_type": "molmo", "d_model": "wide"}'):
            (folder / "config.json").write_text(content)
            with pytest.raises(CheckpointError, match=r"config\.json"):
                read_knob_space(folder, {})
    # Lists that are all given ask nobody.
    wanted = {"tiers": ("low", "high"), "top_ks": (4, 8), "num_blocks": (12, 16)}
    assert read_knob_space(tmp_path / "nowhere", wanted) == KnobSpace(*wanted.values())
    with pytest.raises(CheckpointError, match="nowhere"):
        read_knob_space(tmp_path / "nowhere", {})


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family in which blocks 3 and 5 have to run."""

    def load(*arguments: Any) -> ToyAdapter:
        adapter = load_toy(*arguments)
        adapter.fixed_blocks = frozenset({3, 5})
        return adapter

    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    register_family("fixed", load)
    return "fixed"


def test_fixed_blocks_always_run(fixed: str, tmp_path: Path, law_examples: list[Example]) -> None:
    folder = save_toy(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": fixed}))
    with pytest.raises(KnobError, match=r"drop blocks \[3\]"):
        ElasticModel.from_pretrained(folder)
    model = ElasticModel.from_pretrained(folder, block_order="early_exit")
    assert [model.order.kept(n) for n in (3, 4)] == [(0, 3, 5), (0, 1, 3, 5)]
    found = measure_importance(model, law_examples[:2], 3, num_candidates=2)
    assert not {3, 5} & set(found.removal)
    with pytest.raises(ConfigError, match=r"must be 3\.\.5"):
        measure_importance(model, law_examples[:2], 2)
