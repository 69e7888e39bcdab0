"""A random Gemma 4 of a few layers, with a tokenizer and an image processor, and transformers' own pass of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4ImageProcessorPil

from families.tiny_qwen3_vl import Nothing, build_tokenizer
from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.gemma4.adapter import SPECIAL_TOKENS, Gemma4Adapter

SPECIAL = ("<eos>", "<pad>", *SPECIAL_TOKENS, "<|video|>", "<|audio|>")
PATCH, POOL = 2, 3
LAYERS = ["sliding_attention", "full_attention"] * 3


def save_gemma4(folder: Path, seed: int = 0, text: dict[str, Any] | None = None, **elastic: Any) -> Path:
    """Write a random checkpoint, its tokenizer, image processor and `elastic.json`; returns the folder."""
    tokenizer = build_tokenizer(SPECIAL)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": LAYERS,
        "sliding_window": 24,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
    }
    config = Gemma4Config(
        text_config=settings | (text or {}),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": PATCH,
            "pooling_kernel_size": POOL,
            "position_embedding_size": 1024,
            "initializer_range": 0.25,
            "standardize": True,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma4ForConditionalGeneration(config)
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                # All that a fresh model leaves at one or zero, and a trained one does not.
                if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale", "layer_scalar")):
                    weight.add_(0.2 * torch.randn_like(weight))
                elif name.endswith(("std_bias", "position_embedding_table")):
                    weight.add_(0.5 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Gemma4ImageProcessorPil(patch_size=PATCH, pooling_kernel_size=POOL).save_pretrained(folder)
    values = {
        "vision_budgets": {"low": 70, "medium": 140, "high": 280},
        "removal": [4, 2, 3],
        "max_new_tokens": 6,
        "knob_space": {
            "tiers": ["low", "medium", "high"],
            "top_ks": [1, 2, 3] if config.text_config.enable_moe_block else [1],
            "num_blocks": [3, 4, 5, 6],
        },
    }
    (folder / "elastic.json").write_text(json.dumps(values | elastic))
    return folder


@contextmanager
def changed(adapter: Gemma4Adapter, removed: Collection[int], top_ks: Sequence[int] | None) -> Iterator[None]:
    # The pretended device has no grouped product: transformers would count experts there as a GPU does.
    adapter.model.set_experts_implementation("eager")
    layers = adapter.model.model.language_model.layers
    kept = list(layers)
    configs = [layer.router.config if layer.enable_moe_block else None for layer in kept]
    try:
        for block, layer in enumerate(kept):
            if top_ks is not None and layer.enable_moe_block:
                layer.router.config = SimpleNamespace(top_k_experts=top_ks[block])
            if block in removed:
                layers[block] = Nothing()
        yield
    finally:
        for block, layer in enumerate(kept):
            layers[block] = layer
            if layer.enable_moe_block:
                layer.router.config = configs[block]


@torch.no_grad()
def transformers_pass(
    adapter: Gemma4Adapter,
    prompt: EmbeddedPrompt,
    behind: Tensor,
    removed: Collection[int],
    top_ks: Sequence[int] | None,
) -> tuple[list[Tensor], Tensor]:
    """See `reference_pass`: transformers' own model and masks, given what the blocks read."""
    types = torch.zeros(1, len(prompt.hidden) + len(behind), dtype=torch.long, device=behind.device)
    if prompt.seen_both_ways is not None:
        types[0, slice(*prompt.seen_both_ways)] = 1
    text, streams = adapter.model.model.language_model, []
    with changed(adapter, removed, top_ks):
        # What a layer reads is the stream behind the one before.
        hooks = [
            module.register_forward_pre_hook(lambda _, args: streams.append(args[0][0].clone()))
            for module in (*text.layers, text.norm)
        ]
        out = adapter.model(
            inputs_embeds=torch.cat([prompt.hidden, behind])[None], mm_token_type_ids=types, use_cache=False
        )
        for hook in hooks:
            hook.remove()
    return [streams[block + 1] for block in range(adapter.num_blocks) if block not in removed], out.logits[0]


def naive_experts(adapter: Gemma4Adapter, block: int, x: Tensor, top_k: int) -> Tensor:
    """What a block adds behind attention, token after token, expert after expert; `x` is `(tokens, d_model)`."""
    layer, out = adapter.model.model.language_model.layers[block], []

    def norm(t: Tensor, weight: Tensor | float) -> Tensor:
        return t / (t.square().mean() + adapter.model.config.text_config.rms_norm_eps).sqrt() * weight

    def gated(t: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ (F.gelu(gate @ t, approximate="tanh") * (up @ t))

    mlp = layer.mlp
    for token in x:
        y = norm(token, layer.pre_feedforward_layernorm.weight)
        added = gated(y, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        if layer.enable_moe_block:
            routed = norm(token, layer.router.scale) / len(token) ** 0.5
            best = (layer.router.proj.weight @ routed).softmax(-1).topk(top_k)
            y, mixed = norm(token, layer.pre_feedforward_layernorm_2.weight), torch.zeros_like(token)
            for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
                gate, up = layer.experts.gate_up_proj[expert].chunk(2)
                found = gated(y, gate, up, layer.experts.down_proj[expert])
                mixed = mixed + weight * layer.router.per_expert_scale[expert] * found
            added = norm(added, layer.post_feedforward_layernorm_1.weight)
            added = added + norm(mixed, layer.post_feedforward_layernorm_2.weight)
        added = norm(added, layer.post_feedforward_layernorm.weight)
        out.append((token + added) * layer.layer_scalar - token)
    return torch.stack(out)


def transformers_inputs(
    adapter: Gemma4Adapter, image: Image.Image | None, question: str, budget: int
) -> dict[str, Any]:
    """What transformers' model is given, made from the text of a turn and not from the adapter's parts."""
    adapter.model.set_experts_implementation("eager")
    inputs: dict[str, Any] = {}
    picture = ""
    if image is not None:
        inputs = dict(adapter.image_processor(images=image, max_soft_tokens=budget, return_tensors="pt"))
        count = int(torch.as_tensor(inputs.pop("num_soft_tokens_per_image"))[0])
        picture = f"<|image>{'<|image|>' * count}<image|>"
    text = f"<bos><|turn>user\n{picture}{question}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    ids = torch.tensor(adapter.tokenizer(text)["input_ids"])[None]
    types = (ids == adapter.model.config.image_token_id).int()
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
