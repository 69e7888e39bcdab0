"""The decoder is OLMoE and the vision tower is CLIP: both agree with transformers' own models on random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, OlmoeConfig, OlmoeForCausalLM

from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.image_processing import _to_patches
from pacevlm.models.molmoe.vision import VisionTower

ATOL = 1e-5

MakeModel = Callable[..., MolmoEForConditionalGeneration]


def as_olmoe(model: MolmoEForConditionalGeneration) -> OlmoeForCausalLM:
    """The same decoder as transformers' OLMoE, with the same weights."""
    config = model.config
    olmoe = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.num_embeddings,
            hidden_size=config.d_model,
            intermediate_size=config.expert_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_experts=config.moe_num_experts,
            num_experts_per_tok=config.moe_top_k,
            norm_topk_prob=False,
            rms_norm_eps=config.layer_norm_eps,
            rope_theta=config.rope_theta,
            pad_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours["model.transformer.wte.embedding"],
        "model.norm.weight": ours["model.transformer.ln_f.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    kv_width = config.num_key_value_heads * config.head_dim_
    for layer in range(config.n_layers):
        block, place = f"model.transformer.blocks.{layer}.", f"model.layers.{layer}."
        projections = ours[block + "attn.att_proj.weight"].split([config.d_model, kv_width, kv_width])
        for name, weight in zip("qkv", projections, strict=True):
            theirs[f"{place}self_attn.{name}_proj.weight"] = weight
        for name, other in {
            "attn.attn_out.weight": "self_attn.o_proj.weight",
            "attn.q_norm.weight": "self_attn.q_norm.weight",
            "attn.k_norm.weight": "self_attn.k_norm.weight",
            "attn.attn_norm.weight": "input_layernorm.weight",
            "mlp.ff_norm.weight": "post_attention_layernorm.weight",
            "mlp.gate.weight": "mlp.gate.weight",
            "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj": "mlp.experts.down_proj",
        }.items():
            theirs[place + other] = ours[block + name]
    olmoe.load_state_dict(theirs)
    return olmoe


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"moe_top_k": 1}, {"moe_num_experts": 16, "moe_top_k": 8, "rope_theta": 500.0}],
    ids=["plain", "fewer kv heads", "top-1", "16 experts"],
)
@torch.no_grad()
def test_the_decoder_is_olmoe(make_model: MakeModel, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    olmoe = as_olmoe(model)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 64, (3, 21), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, :6], mask[2, 15:] = 0, 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    settings = {"attention_mask": mask, "output_hidden_states": True, "output_router_logits": True}
    ours = model(input_ids, **settings)
    theirs = olmoe(input_ids, position_ids=position_ids, **settings)
    real = mask.bool()
    # The last of their hidden states is behind the final norm.
    our_states = [*ours.hidden_states[:-1], model.model.transformer.ln_f(ours.hidden_states[-1])]
    assert len(our_states) == len(theirs.hidden_states) == model.config.n_layers + 1
    for our_state, their_state in zip(our_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(our_state[real], their_state[real], atol=ATOL, rtol=0)
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], atol=ATOL, rtol=0)
    assert ours.logits[real].std() > 0.1  # the weights are no trivial ones


@torch.no_grad()
def test_renormalised_weights_are_another_model(make_model: MakeModel) -> None:
    model = make_model()
    olmoe = as_olmoe(model)
    for layer in olmoe.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    input_ids = torch.arange(20)[None]
    assert (model(input_ids).logits - olmoe(input_ids).logits).abs().max() > 0.01


def as_clip(tower: VisionTower, settings: dict[str, Any]) -> CLIPVisionModel:
    """The same vision tower as transformers' CLIP, with the same weights."""
    size = settings["image_default_input_size"][0]
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=settings["image_emb_dim"],
            intermediate_size=settings["image_mlp_dim"],
            num_hidden_layers=settings["image_num_layers"],
            num_attention_heads=settings["image_num_heads"],
            image_size=size,
            patch_size=settings["image_patch_size"],
            hidden_act="quick_gelu",
            layer_norm_eps=settings["image_norm_eps"],
        )
    ).eval()
    ours, patch = tower.state_dict(), settings["image_patch_size"]
    patches = ours["patch_embedding.weight"].view(-1, patch, patch, 3)  # row, column, channel
    theirs = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
        "embeddings.patch_embedding.weight": patches.permute(0, 3, 1, 2),
    }
    parts = {"pre_ln": "pre_layrnorm"}
    for layer in range(settings["image_num_layers"]):
        block, place = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        parts |= {f"{block}attention.w{x}": f"{place}self_attn.{x}_proj" for x in "qkv"}
        parts |= {
            f"{block}attention.wo": f"{place}self_attn.out_proj",
            f"{block}attention_norm": f"{place}layer_norm1",
            f"{block}ffn_norm": f"{place}layer_norm2",
            f"{block}feed_forward.w1": f"{place}mlp.fc1",
            f"{block}feed_forward.w2": f"{place}mlp.fc2",
        }
    theirs |= {f"{b}.{kind}": ours[f"{a}.{kind}"] for a, b in parts.items() for kind in ("weight", "bias")}
    # Between releases the inner model moved up; the norm behind the last block has no counterpart and is not used.
    loaded = getattr(clip, "vision_model", clip).load_state_dict(theirs, strict=False)
    assert not loaded.unexpected_keys
    assert all("post_layernorm" in key or "position_ids" in key for key in loaded.missing_keys)
    return clip


@pytest.mark.parametrize("vit_layers", [[-1, -3], [-2, -3], [0], [2, 1, 0]], ids=str)
@torch.no_grad()
def test_the_vision_tower_is_clip(make_model: MakeModel, randomise: Callable[..., None], vit_layers: list[int]) -> None:
    model = make_model(vit_layers=vit_layers)
    tower, settings = model.model.vision_backbone.image_vit, model.config.vision_backbone
    randomise(tower, seed=2)
    clip = as_clip(tower, settings)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    patches = torch.stack([_to_patches(image, settings["image_patch_size"]).flatten(0, 1) for image in pixels])
    states = clip(pixel_values=pixels, output_hidden_states=True).hidden_states
    depth = settings["image_num_layers"]
    expected = torch.cat([states[1 + layer % depth] for layer in vit_layers], dim=-1)[:, 1:]  # no class token
    torch.testing.assert_close(tower(patches), expected, atol=ATOL, rtol=0)
    assert expected.std() > 0.1
