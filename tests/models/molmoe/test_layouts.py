"""Checkpoints in the layouts that MolmoE is published in load to the bit, whatever lies beside their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pacevlm.errors import CheckpointError
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.registry import load_adapter
from pacevlm.request.run import run_forced
from pacevlm.types import Example

SIDE_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
RESHARDED = {"published": 7, "training": 3}


def as_published(model: MolmoEForConditionalGeneration) -> dict[str, Tensor]:
    """Names of the Hugging Face checkpoint, written out from its table: three matrices for every expert."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
    for i, block in enumerate(model.model.transformer.blocks):
        for e in range(model.config.moe_num_experts):
            gate, up = block.mlp.experts.gate_up_proj[e].tensor_split(2)
            name = f"model.transformer.blocks.{i}.mlp.experts.{e}"
            tensors |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up}
            tensors[f"{name}.down_proj.weight"] = block.mlp.experts.down_proj[e]
    return tensors


def as_trained(model: MolmoEForConditionalGeneration) -> dict[str, Tensor]:
    """Names of the training repository, written out from its table: three tensors for all experts of a block."""
    tower = {f"vision_backbone.{n}": t for n, t in model.model.vision_backbone.state_dict().items()}
    transformer = model.model.transformer
    tensors = {
        **tower,
        "transformer.wte.embedding": transformer.wte.embedding,
        "transformer.wte.new_embedding": transformer.wte.new_embedding,
        "transformer.ln_f.weight": transformer.ln_f.weight,
        "transformer.ff_out.weight": model.lm_head.weight,
    }
    for i, block in enumerate(transformer.blocks):
        attn, mlp, name = block.attn, block.mlp, f"transformer.blocks.{i}"
        for part in ("attn_norm", "att_proj", "q_norm", "k_norm", "attn_out"):
            tensors[f"{name}.{part}.weight"] = getattr(attn, part).weight
        tensors |= {f"{name}.ff_norm.weight": mlp.ff_norm.weight, f"{name}.ffn.router.layer.weight": mlp.gate.weight}
        halves = [expert.tensor_split(2) for expert in mlp.experts.gate_up_proj]
        tensors[f"{name}.ffn.experts.mlp.w1"] = torch.cat([gate for gate, _ in halves])
        tensors[f"{name}.ffn.experts.mlp.v1"] = torch.cat([up for _, up in halves])
        tensors[f"{name}.ffn.experts.mlp.w2"] = torch.cat([down.T for down in mlp.experts.down_proj])
    return tensors


LAYOUTS = {"published": as_published, "training": as_trained}


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int) -> None:
    """Spread tensors over files, in turn, with the index that names them."""
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        names = list(tensors)[number::count]
        save_file({name: tensors[name].detach().contiguous().clone() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def rewrite(tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny model in a layout; `published` also with the side files that lie beside the real one."""

    def write(layout: str, count: int | None = None) -> Path:
        folder = tmp_path / layout
        folder.mkdir()
        for name in SIDE_FILES:
            shutil.copy(tiny_elastic_dir / name, folder / name)
        write_shards(folder, LAYOUTS[layout](tiny_elastic.adapter.model), count or RESHARDED[layout])
        if layout == "published":
            write_side_files(folder)
        return folder

    return write


def write_side_files(folder: Path) -> None:
    """What the published folder holds besides: references to code, stale ids, and names that mislead."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["OLMoForCausalLM"],
        "auto_map": {
            "AutoConfig": "config_molmoe.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmoe.MolmoForCausalLM",
        },
        "activation_type": "swiglu",
        "torch_dtype": "float32",
        "query_pre_attn_scalar": 224,
        "moe_capacity_factor": 1.25,
        "alibi_bias_max": 8.0,
        "residual_dropout": 0.1,
        "transformers_version": "4.45.0.dev0",
    }
    (folder / "config.json").write_text(json.dumps(config))
    image = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    code = {"AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor"}
    code |= {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "auto_map": code,
                "base_image_input_size": [image["crop_size"]] * 2,
                "do_normalize": True,
                "image_mean": image["image_mean"],
                "image_padding_mask": True,
                "image_patch_size": image["patch_size"],
                "image_processor_type": "MolmoImageProcessor",
                "image_std": image["image_std"],
                "image_token_length_h": 3,
                "image_token_length_w": 3,
                "max_crops": image["max_crops"],
                "overlap_margins": image["margins"],
                "processor_class": "MolmoProcessor",
            }
        )
    )
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": code, "processor_class": "MolmoProcessor"}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": code, "tokenizer_class": "GPTNeoXTokenizer", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stale = {"<im_start>": 100278, "<im_end>": 100279, "<im_patch>": 100280, "<im_col>": 100281, "<|image|>": 100282}
    (folder / "added_tokens.json").write_text(json.dumps(stale))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "unk_token": "<|unk|>", "pad_token": "<|pad|>"})
    )
    (folder / "modeling_molmoe.py").write_text("raise SystemExit('code from a checkpoint was run')")
    (folder / "config_molmoe.py").write_text("raise SystemExit('code from a checkpoint was run')")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_to_the_bit(
    rewrite: Callable[..., Path], tiny_elastic: ElasticModel, law_examples: list[Example], layout: str
) -> None:
    model = ElasticModel.from_pretrained(
        rewrite(layout),
        knob_space=tiny_elastic.knob_space,
        vision_budgets=tiny_elastic.vision_budgets,
        max_new_tokens=6,
        block_order="early_exit",
    )
    wanted = tiny_elastic.adapter.model.state_dict()
    for name, weight in model.adapter.model.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    for example in law_examples:
        found, expected = (
            run_forced(m, example.source, example.question, m.knob_space.full) for m in (model, tiny_elastic)
        )
        assert (found.token_ids, found.vision) == (expected.token_ids, expected.vision)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_on_disk_is_rounded_once(
    rewrite: Callable[..., Path], tiny_elastic: ElasticModel, layout: str, dtype: torch.dtype
) -> None:
    adapter = load_adapter(rewrite(layout), torch.device("cpu"), dtype)
    wanted = tiny_elastic.adapter.model.state_dict()
    for name, weight in adapter.model.state_dict().items():
        assert torch.equal(weight, wanted[name].to(dtype)), name


def test_without_elastic_json_the_models_own_numbers_hold(rewrite: Callable[..., Path]) -> None:
    folder = rewrite("published")
    with pytest.raises(CheckpointError, match=r"run `pacevlm importance`.* or choose block_order='early_exit'"):
        ElasticModel.from_pretrained(folder)
    model = ElasticModel.from_pretrained(folder, block_order="early_exit")
    assert (model.knob_space.top_ks, model.knob_space.num_blocks) == ((2, 3, 4), (5, 6))
    assert model.vision_budgets == {"low": 2, "medium": 6, "high": 12}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_wrong_with_the_weights_is_named(
    rewrite: Callable[..., Path], tiny_elastic: ElasticModel, layout: str
) -> None:
    folder = rewrite(layout)
    tensors = LAYOUTS[layout](tiny_elastic.adapter.model)
    name = next(name for name in tensors if "experts" in name)
    device, dtype = torch.device("cpu"), torch.float32

    def refused(match: str, **changes: Any) -> None:
        write_shards(folder, {n: t for n, t in (tensors | changes).items() if t is not None}, RESHARDED[layout])
        with pytest.raises(CheckpointError, match=match):
            load_adapter(folder, device, dtype)

    refused(rf"1 tensors are missing \({name}\)", **{name: None})
    refused(r"1 tensors belong to no part of the model \(model\.extra\)", **{"model.extra": torch.ones(2)})
    refused(rf"{name} is \(3, 2\), not", **{name: torch.ones(3, 2)})
    refused(rf"stored as other than .*{name} is I8", **{name: torch.ones(tensors[name].shape, dtype=torch.int8)})
    write_shards(folder, tensors, RESHARDED[layout])
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated or corrupt"):
        load_adapter(folder, device, dtype)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"of which 1 are not there: {shard.name}"):
        load_adapter(folder, device, dtype)
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    for malformed in ({"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}):
        index.write_text(json.dumps(malformed))
        with pytest.raises(CheckpointError, match="no weight_map"):
            load_adapter(folder, device, dtype)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not there"):
        load_adapter(folder, device, dtype)


def test_a_training_checkpoint_needs_the_published_settings(rewrite: Callable[..., Path]) -> None:
    folder = rewrite("training")
    (folder / "config.json").rename(folder / "config.yaml")
    with pytest.raises(CheckpointError, match=r"config\.yaml of the training repository, but no config\.json"):
        ElasticModel.from_pretrained(folder)


def test_the_towers_joined_weights_are_in_memory_once(tiny_elastic: ElasticModel) -> None:
    blocks = tiny_elastic.adapter.model.model.vision_backbone.image_vit.transformer.resblocks
    for block, layer in zip(blocks, tiny_elastic.adapter.tower.layers, strict=False):
        parts = [getattr(block.attention, name) for name in ("wq", "wk", "wv")]
        assert {part.weight.untyped_storage().data_ptr() for part in parts} == {
            layer.qkv[0].untyped_storage().data_ptr()
        }
        assert torch.equal(torch.cat([part.weight for part in parts]), layer.qkv[0])
        assert torch.equal(torch.cat([part.bias for part in parts]), layer.qkv[1])
