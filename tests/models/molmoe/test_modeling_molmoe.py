"""MolmoE as a transformers model: Auto classes, files, generation, batches, knobs, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
)

from pacevlm.errors import ConfigError, KnobError
from pacevlm.models import experts as experts_module
from pacevlm.models.experts import route, run_experts
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration, MolmoEModel, MolmoEProcessor
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor, prepare_image
from pacevlm.models.molmoe.processing import PreparedRequest, SpecialTokenIds, assemble_request, collate_requests
from pacevlm.models.molmoe.tiling import CropGeometry
from pacevlm.models.molmoe.tokenization import build_tokenizer
from recipes.parity.greedy import decode_greedily

MakeModel = Callable[..., MolmoEForConditionalGeneration]
GEOMETRY = CropGeometry(32, 4, (2, 2))
SPECIAL = SpecialTokenIds(bos=55, im_start=56, im_end=57, im_patch=58, im_col=59)
IMAGE_INPUTS = ("images", "image_masks", "image_input_idx")


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> MolmoEForConditionalGeneration:
    return make_model()


def request(height: int, width: int, prompt: list[int], seed: int = 0) -> PreparedRequest:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return assemble_request([], prompt, prepare_image(image, 4, GEOMETRY), SPECIAL)


REQUESTS = [
    request(24, 24, [3, 1, 4, 1, 5, 9, 2, 6], seed=0),  # one crop
    request(20, 90, [7, 7, 12], seed=1),  # three in a row
    assemble_request([], [11, 13, 17, 19, 23], None, SPECIAL),  # no image
]


def close(ours: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


# Files and Auto classes


def checkpoint_shapes(config: MolmoEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, from the table of the specification."""
    d, inner, vision = config.d_model, config.expert_dim, config.vision_backbone
    width, heads = vision["image_emb_dim"], vision["image_num_heads"] * vision["image_head_dim"]
    features = width * len(config.vit_layers)
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.embedding": (config.embedding_size, d),
        "model.transformer.wte.new_embedding": (config.additional_vocab_size, d),
        "model.transformer.ln_f.weight": (d,),
        "lm_head.weight": (config.embedding_size, d),
        "model.vision_backbone.pad_embed": (2, features),
        "model.vision_backbone.image_vit.class_embedding": (width,),
        "model.vision_backbone.image_vit.positional_embedding": (vision["image_num_pos"], width),
        "model.vision_backbone.image_vit.patch_embedding.weight": (width, 3 * vision["image_patch_size"] ** 2),
        "model.vision_backbone.image_vit.pre_ln.weight": (width,),
        "model.vision_backbone.image_vit.pre_ln.bias": (width,),
        "model.vision_backbone.image_pooling_2d.wo.weight": (width, heads),
        "model.vision_backbone.image_pooling_2d.wo.bias": (width,),
        "model.vision_backbone.image_projector.w1.weight": (inner, width),
        "model.vision_backbone.image_projector.w2.weight": (d, inner),
        "model.vision_backbone.image_projector.w3.weight": (inner, width),
    }
    for name in ("wq", "wk", "wv"):
        shapes[f"model.vision_backbone.image_pooling_2d.{name}.weight"] = (heads, features)
        shapes[f"model.vision_backbone.image_pooling_2d.{name}.bias"] = (heads,)
    for i in range(config.n_layers):
        block = f"model.transformer.blocks.{i}."
        shapes |= {
            f"{block}attn.attn_norm.weight": (d,),
            f"{block}attn.att_proj.weight": (3 * d, d),
            f"{block}attn.q_norm.weight": (d,),
            f"{block}attn.k_norm.weight": (d,),
            f"{block}attn.attn_out.weight": (d, d),
            f"{block}mlp.ff_norm.weight": (d,),
            f"{block}mlp.gate.weight": (config.moe_num_experts, d),
        }
        for e in range(config.moe_num_experts):
            shapes[f"{block}mlp.experts.{e}.gate_proj.weight"] = (inner, d)
            shapes[f"{block}mlp.experts.{e}.up_proj.weight"] = (inner, d)
            shapes[f"{block}mlp.experts.{e}.down_proj.weight"] = (d, inner)
    for v in range(vision["image_num_layers"]):
        block = f"model.vision_backbone.image_vit.transformer.resblocks.{v}."
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            shapes[f"{block}attention_norm.{kind}"] = shapes[f"{block}ffn_norm.{kind}"] = (width,)
            for name in ("wq", "wk", "wv"):
                shapes[f"{block}attention.{name}.{kind}"] = (heads, width) if matrix else (heads,)
            shapes[f"{block}attention.wo.{kind}"] = (width, heads) if matrix else (width,)
            hidden = vision["image_mlp_dim"]
            shapes[f"{block}feed_forward.w1.{kind}"] = (hidden, width) if matrix else (hidden,)
            shapes[f"{block}feed_forward.w2.{kind}"] = (width, hidden) if matrix else (width,)
    return shapes


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_saved_model_has_the_published_names_and_loads_bit_for_bit(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (max_shard_size == "40KB")
    stored = stored_tensors(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == checkpoint_shapes(model.config)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    experts = model.model.transformer.blocks[1].mlp.experts
    place = "model.transformer.blocks.1.mlp.experts.4."
    gate_up = torch.cat([stored[f"{place}gate_proj.weight"], stored[f"{place}up_proj.weight"]])
    assert torch.equal(gate_up, experts.gate_up_proj[4])
    assert torch.equal(stored[f"{place}down_proj.weight"], experts.down_proj[4])
    loaded, info = MolmoEForConditionalGeneration.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == dtype for name in ours)
    assert not loaded.training


def test_the_real_size_has_the_published_names_and_parameters() -> None:
    config = MolmoEConfig()
    with torch.device("meta"):
        model = MolmoEForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_221_875_712
    assert sum(np.prod(shape) for shape in checkpoint_shapes(config).values()) == 7_221_875_712
    block = model.model.transformer.blocks[0]
    assert sum(parameter.numel() for parameter in block.parameters()) == 419_569_664
    # Beside the experts, names in memory are names on disk.
    names = {name for name, _ in model.named_parameters()}
    fused = re.compile(r"mlp\.experts\.")
    assert {n for n in names if not fused.search(n)} == {n for n in checkpoint_shapes(config) if not fused.search(n)}


def test_auto_classes_know_molmoe(model: MolmoEForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer = build_tokenizer(["What is this? 1234567890"] * 9, 300)
    MolmoEProcessor(MolmoEImageProcessor(32, 4, (2, 2), max_crops=4), tokenizer, max_length=300).save_pretrained(
        tmp_path
    )
    assert type(AutoConfig.from_pretrained(tmp_path)) is MolmoEConfig
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is MolmoEProcessor
    assert processor.image_processor.geometry == GEOMETRY
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is MolmoEForConditionalGeneration
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is MolmoEModel
    weights = headless.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.model.state_dict().items())


def test_a_configuration_survives_its_file(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    # Fields of the published file that mean nothing at inference are kept.
    given = {**tiny_settings, "moe_capacity_factor": 1.25, "architectures": ["OLMoForCausalLM"], "rope": True}
    MolmoEConfig(**given, padding_crop_rule="any").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert text["model_type"] == "molmo"
    for name, value in given.items():
        if name != "vision_backbone":
            assert text[name] == value
    assert tiny_settings["vision_backbone"].items() <= text["vision_backbone"].items()
    loaded = MolmoEConfig.from_pretrained(tmp_path)
    assert (loaded.padding_crop_rule, loaded.moe_capacity_factor) == ("any", 1.25)
    aliases = (loaded.hidden_size, loaded.num_hidden_layers, loaded.num_attention_heads, loaded.num_experts_per_tok)
    assert aliases == (32, 4, 4, 3)


def test_published_field_values_are_accepted() -> None:
    config = MolmoEConfig(
        d_model=2048,
        n_kv_heads=None,
        mlp_ratio=1,
        mlp_hidden_size=None,
        embedding_size=50304,
        vocab_size=50280,
        activation_type="swiglu",
        block_type="moe",
        layer_norm_type="rms",
        image_pooling_2d="attention_meanq",  # as the training code spells it
        query_pre_attn_scalar=224,
        residual_dropout=0.1,
        clip_qkv=None,
        norm_after=False,
        use_cls_feature=False,
    )
    assert (config.expert_dim, config.num_embeddings, config.head_dim_, config.patches_per_side) == (
        1024,
        50304,
        128,
        24,
    )
    assert config.num_key_value_heads == 16
    assert MolmoEConfig(mlp_hidden_size=22016).expert_dim == 11008
    assert MolmoEConfig(embedding_size=None).num_embeddings == 50280


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_after": True},
        {"attention_layer_norm": False},
        {"weight_tying": True},
        {"rope_impl": "interleaved"},
        {"clip_qkv": 8.0},
        {"qkv_bias": True},
        {"block_type": "sequential"},
        {"moe_shared_expert": True},
        {"final_logit_softcapping": 30.0},
        {"use_cls_feature": True},
        {"image_pooling_2d": "attention"},
        {"image_pooling_2d": None},
        {"image_projector": "linear"},
        {"image_padding_embed": None},
        {"padding_crop_rule": "some"},
        {"d_model": 30},
        {"d_model": 0},
        {"d_model": "32"},
        {"n_heads": 0},
        {"n_kv_heads": 3},
        {"n_layers": 2.5},
        {"moe_top_k": 0},
        {"moe_top_k": 7},
        {"moe_num_experts": -1},
        {"mlp_hidden_size": 1},
        {"vit_layers": [3]},
        {"vit_layers": []},
        {"vit_layers": "-2"},
        {"overlap_margins": 4},
        {"vision_backbone": [1]},
        {"vision_backbone": {"image_mlp_activations": "gelu"}},
        {"vision_backbone": {"image_num_pos": 50}},
        {"vision_backbone": {"image_default_input_size": [32, 36]}},
        {"vision_backbone": {"image_default_input_size": 32}},
        {"vision_backbone": {"image_num_key_value_heads": 1}},
        {"vision_backbone": {"image_patch_size": 0}},
    ],
    ids=str,
)
def test_other_variants_and_impossible_sizes_are_refused(
    tiny_settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    vision = changes.get("vision_backbone")
    if isinstance(vision, dict):
        changes = {"vision_backbone": {**tiny_settings["vision_backbone"], **vision}}
    (name,) = changes
    inner = next(iter(vision)) if isinstance(vision, dict) else name
    mentions = {"image_default_input_size": "crops of|image_default_input_size", "mlp_hidden_size": "mlp_hidden_size"}
    with pytest.raises(ConfigError, match=mentions.get(inner, inner)):
        MolmoEConfig(**{**tiny_settings, **changes})


# Running


@torch.no_grad()
def test_a_batch_gives_every_row_what_it_gives_alone(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    together = model(**batch).logits
    for row, single in enumerate(REQUESTS):
        alone = model(**collate_requests([single])).logits[0]
        close(together[row, : len(single.input_ids)], alone)
    # Without a mask, ids of -1 are padding.
    implied = model(**{name: tensor for name, tensor in batch.items() if name != "attention_mask"}).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(implied[real], together[real])


@torch.no_grad()
def test_features_are_added_where_the_index_says(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    features = model.model.image_features(batch["images"], batch["image_masks"])
    embeds = model.model.embed(batch["input_ids"], features, batch["image_input_idx"])
    expected = model.model.embed(batch["input_ids"])
    for row, crop, cell in (batch["image_input_idx"] >= 0).nonzero().tolist():
        expected[row, batch["image_input_idx"][row, crop, cell]] += features[row, crop, cell]
    close(embeds, expected, atol=1e-6)
    # Features and embeddings that are computed already do as well as an image.
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**batch).logits
    precomputed = model(**text, image_features=features, image_input_idx=batch["image_input_idx"])
    assert torch.equal(precomputed.logits, logits)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits, logits)


@torch.no_grad()
def test_both_embedding_tables_are_one(model: MolmoEForConditionalGeneration) -> None:
    wte = model.model.transformer.wte
    ids = torch.tensor([[0, 63, 64, 71, 5]])
    assert torch.equal(wte(ids), torch.cat([wte.embedding, wte.new_embedding])[ids])


def padded_in_front(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with each row's padding moved to its front."""
    tokens = batch["input_ids"].shape[1]
    moved = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            moved[name][row] = batch[name][row].roll(tokens - length)
        index = batch["image_input_idx"][row]
        moved["image_input_idx"][row] = torch.where(index >= 0, index + tokens - length, index)
    return moved


KNOBS: list[dict[str, Any]] = [
    {},
    {"top_k_per_block": [3, 1, 2, 1]},
    {"removed_blocks": [2]},
    {"removed_blocks": [0, 3], "top_k_per_block": [2] * 4},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@torch.no_grad()
def test_padding_in_front_and_behind_give_the_same_tokens(
    model: MolmoEForConditionalGeneration, knobs: dict[str, Any]
) -> None:
    batch = collate_requests(REQUESTS)
    ids, logits = decode_greedily(model, batch, 7, **knobs)
    in_front, front_logits = decode_greedily(model, padded_in_front(batch), 7, **knobs)
    assert torch.equal(ids, in_front)
    close(logits, front_logits, atol=1e-4)
    for row, single in enumerate(REQUESTS):
        assert torch.equal(decode_greedily(model, collate_requests([single]), 7, **knobs)[0][0], ids[row])
    # The rows do not simply repeat one token.
    assert len(set(ids.flatten().tolist())) > 3


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@torch.no_grad()
def test_generate_gives_the_same_tokens(
    model: MolmoEForConditionalGeneration, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate_requests(REQUESTS)
    expected, _ = decode_greedily(model, batch, 7, **knobs)
    calls: list[int] = []
    backbone = model.model.vision_backbone
    forward = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda *a: calls.append(1) or forward(*a))
    for inputs in (batch, padded_in_front(batch)):
        for use_cache in (True, False):
            generated = model.generate(**inputs, max_new_tokens=7, do_sample=False, use_cache=use_cache, **knobs)
            tokens = batch["input_ids"].shape[1]
            assert torch.equal(generated[:, :tokens], inputs["input_ids"])
            assert torch.equal(generated[:, tokens:], expected)
            # With a cache the image is encoded once; without one every step needs it.
            assert len(calls) == (1 if use_cache else 7)
            calls.clear()


@pytest.mark.parametrize("removed_blocks", [[], [0], [1, 3]], ids=str)
@torch.no_grad()
def test_a_cache_changes_nothing(model: MolmoEForConditionalGeneration, removed_blocks: list[int]) -> None:
    batch = collate_requests(REQUESTS[:2])
    whole = model(**batch, removed_blocks=removed_blocks, use_cache=False)
    assert whole.past_key_values is None
    cut = int(batch["image_input_idx"].max()) + 2
    cache = DynamicCache()
    first = {**batch, "input_ids": batch["input_ids"][:, :cut], "attention_mask": batch["attention_mask"][:, :cut]}
    logits = [model(**first, past_key_values=cache, removed_blocks=removed_blocks).logits]
    for end in range(cut + 1, batch["input_ids"].shape[1] + 1):
        ids, mask = batch["input_ids"][:, end - 1 : end], batch["attention_mask"][:, :end]
        logits.append(model(ids, attention_mask=mask, past_key_values=cache, removed_blocks=removed_blocks).logits)
    real = batch["attention_mask"].bool()
    close(torch.cat(logits, 1)[real], whole.logits[real])


@torch.no_grad()
def test_only_the_last_real_token_gets_logits_if_asked(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    everything = model(**batch).logits
    last = batch["attention_mask"].sum(1) - 1
    close(model(**batch, logits_to_keep=1).logits[:, 0], everything[torch.arange(3), last], atol=1e-6)
    close(model(**batch, logits_to_keep=3).logits, everything[:, -3:], atol=1e-6)
    close(model(**batch, logits_to_keep=torch.tensor([0, 4])).logits, everything[:, [0, 4]], atol=1e-6)


@torch.no_grad()
def test_packed_questions_see_their_context_and_not_each_other(model: MolmoEForConditionalGeneration) -> None:
    context, questions = [3, 1, 4, 1, 5], [[9, 2, 6], [5, 3], [5, 8, 9, 7]]
    ids, segments, positions = list(context), [100] * 5, list(range(5))
    for segment, question in enumerate(questions):
        ids += question
        segments += [segment] * len(question)
        positions += range(5, 5 + len(question))
    given = {"subsegment_ids": torch.tensor([segments]), "position_ids": torch.tensor([positions])}
    packed = model(torch.tensor([ids]), **given).logits[0]
    start = 5
    for question in questions:
        alone = model(torch.tensor([context + question])).logits[0]
        close(packed[:5], alone[:5])
        close(packed[start : start + len(question)], alone[5:])
        start += len(question)
    with pytest.raises(ValueError, match="position_ids"):
        model(torch.tensor([ids]), subsegment_ids=given["subsegment_ids"])
    # The same rule as an explicit mask.
    seg = torch.tensor(segments)
    mask = (seg[:, None] <= seg[None, :]) & torch.ones(len(ids), len(ids)).tril().bool()
    explicit = model(torch.tensor([ids]), attention_mask=mask[None, None], position_ids=given["position_ids"])
    close(explicit.logits[0], packed)


@torch.no_grad()
def test_the_loss_is_the_next_tokens_cross_entropy(model: MolmoEForConditionalGeneration) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    labels = torch.tensor([[-100, -100, 4, 1, -100, 9]])
    out = model(ids, labels=labels)
    chances = out.logits[0].log_softmax(-1)
    expected = -(chances[1, 4] + chances[2, 1] + chances[4, 9]) / 3
    close(out.loss, expected)


@pytest.mark.parametrize("rule", ["all", "any"])
@torch.no_grad()
def test_padding_crops_follow_the_rule(make_model: MakeModel, rule: str) -> None:
    backbone = make_model(padding_crop_rule=rule).model.vision_backbone
    crops = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0))
    crops[1] = -1.0
    crops[2, 5, 7] = -1.0
    zeroed = backbone.vit_features(crops).eq(0).all(-1).all(-1).tolist()
    assert zeroed == [False, True, rule == "any"]


# Knobs


@torch.no_grad()
def test_rows_with_their_own_top_k_get_what_they_get_alone(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    top_ks = torch.tensor([[1, 3, 2], [3, 3, 3], [6, 1, 4], [2, 2, 1]])  # blocks, rows
    together = model(**batch, top_k_per_block=list(top_ks)).logits
    for row, single in enumerate(REQUESTS):
        alone = model(**collate_requests([single]), top_k_per_block=top_ks[:, row].tolist()).logits[0]
        close(together[row, : len(single.input_ids)], alone)
    assert (together - model(**batch).logits).abs().max() > 0.01


@torch.no_grad()
def test_trained_knobs_are_the_unmodified_model(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    expected = model(**batch).logits
    assert torch.equal(model(**batch, top_k_per_block=[3] * 4, removed_blocks=[]).logits, expected)
    assert torch.equal(model(**batch, top_k_per_block=[torch.full((3,), 3)] * 4).logits, expected)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"removed_blocks": [4]}, r"\[4\].*0\.\.3"),
        ({"removed_blocks": [-1]}, r"\[-1\]"),
        ({"top_k_per_block": [3, 3, 3]}, "3 entries; give one for each of 4"),
        ({"top_k_per_block": [3, 0, 3, 3]}, r"top_k 0 .*1\.\.6"),
        ({"top_k_per_block": [3, 7, 3, 3]}, r"top_k 7 .*1\.\.6"),
        ({"top_k_per_block": [torch.tensor([9])] * 4}, "top_k 9"),
    ],
    ids=str,
)
def test_knobs_that_the_model_cannot_run_are_refused(
    model: MolmoEForConditionalGeneration, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(KnobError, match=message):
        model(torch.tensor([[1, 2]]), **knobs)


def test_incomplete_inputs_are_refused(model: MolmoEForConditionalGeneration) -> None:
    batch = collate_requests(REQUESTS)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    for missing in ("image_masks", "image_input_idx"):
        with pytest.raises(ValueError, match=missing):
            model(**{name: tensor for name, tensor in batch.items() if name != missing})
    with pytest.raises(ValueError, match="beyond the 3 tokens"):
        model(batch["input_ids"][:, :3], **{name: batch[name] for name in IMAGE_INPUTS})
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(3, 4, 32), **{name: batch[name] for name in IMAGE_INPUTS})


# Experts


def naive_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, keep: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for place in range(experts.shape[1]):
            if keep[token, place]:
                expert = experts[token, place]
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                out[token] += weights[token, place] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "loop"])
@pytest.mark.parametrize(("d_model", "inner"), [(16, 8), (10, 8), (16, 7), (6, 3)])
@pytest.mark.parametrize("keep_all", [True, False])
def test_experts_are_the_weighted_sum(
    d_model: int, inner: int, keep_all: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr(experts_module, "_supports_grouped_mm", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    x, router = torch.randn(9, d_model, generator=generator), torch.randn(9, 7, generator=generator)
    router[:, 5] = -50.0  # an expert that nobody chooses
    gate_up = torch.randn(7, 2 * inner, d_model, generator=generator)
    down = torch.randn(7, d_model, inner, generator=generator)
    weights, chosen = route(router, 4, torch.float32)
    keep = torch.arange(4) < torch.randint(1, 5, (9, 1), generator=generator)
    expected = naive_experts(x, weights, chosen, gate_up, down, torch.ones_like(keep) if keep_all else keep)
    ours = run_experts(x, weights, chosen, gate_up, down, None if keep_all else keep)
    close(ours, expected, atol=1e-4)


def test_grouped_and_looped_experts_are_both_used() -> None:
    """Dimensions that the grouped kernel cannot take (rows of no whole 16 bytes) go through the loop."""
    supports = experts_module._supports_grouped_mm
    x = torch.zeros(1, 16)
    assert supports(x, torch.zeros(2, 16, 8))
    assert not supports(x, torch.zeros(2, 16, 10))
    assert not supports(x, torch.zeros(2, 14, 16))
    assert not supports(x, torch.zeros(2, 16, 12, dtype=torch.float16))


def test_kept_router_weights_do_not_depend_on_top_k() -> None:
    router = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weights, chosen = route(router, 8, torch.float32)
    close(weights.sum(-1), torch.ones(5), atol=1e-6)
    for top_k in range(1, 8):
        fewer, experts = route(router, top_k, torch.float32)
        assert torch.equal(experts, chosen[:, :top_k])
        assert torch.equal(fewer, weights[:, :top_k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_stays_near(make_model: MakeModel, dtype: torch.dtype) -> None:
    batch = collate_requests(REQUESTS)
    expected = make_model()(**batch).logits
    ours = make_model().to(dtype)(**batch).logits
    assert ours.dtype == dtype
    real = batch["attention_mask"].bool()
    error = (ours.float() - expected)[real].abs().mean() / expected[real].std()
    assert error < 0.1


@pytest.mark.parametrize("sides", [(32, 32), (28, 28)], ids=["even grid", "odd grid"])
@torch.no_grad()
def test_odd_patch_grids_are_padded_for_pooling(make_model: MakeModel, sides: tuple[int, int]) -> None:
    num_patches = (sides[0] // 4) ** 2
    vision = {"image_default_input_size": list(sides), "image_num_pos": num_patches + 1}
    config = make_model().config.vision_backbone
    model = make_model(vision_backbone={**config, **vision})
    images = torch.randn(1, 2, num_patches, 48, generator=torch.Generator().manual_seed(0))
    features = model.model.image_features(images, torch.ones(1, 2, num_patches))
    assert features.shape == (1, 2, 16, 32)
