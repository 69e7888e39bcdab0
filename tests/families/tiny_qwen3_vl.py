"""A random Qwen3-VL of a few layers, with experts or dense, all that goes with it, and transformers' own pass of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pacevlm.models.adapter import EmbeddedPrompt
from pacevlm.models.qwen3_vl.adapter import Qwen3VLAdapter

ENDS = ("<|im_end|>", "<|endoftext|>")
SPECIAL = [*ENDS, "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEXTS = ["Which number is the largest? 407", "How many red digits are there?", "user assistant red green blue"] * 20
PATCH, MERGE = 4, 2


def build_tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; of the special tokens the first ends an answer and the second fills."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[0],
        pad_token=special[1],
        extra_special_tokens=list(special[2:]),
    )


def save_qwen3_vl(folder: Path, **elastic: Any) -> Path:
    """See `save_qwen3_vl_moe`, for a dense one."""
    return save_qwen3_vl_moe(folder, dense=True, **elastic)


def save_qwen3_vl_moe(
    folder: Path, seed: int = 0, text: dict[str, Any] | None = None, dense: bool = False, **elastic: Any
) -> Path:
    """Write a random checkpoint, its tokenizer, image processor and `elastic.json`; returns the folder."""
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "eos_token_id": [ids[token] for token in ENDS],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    if not dense:
        settings |= {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
    config_class, model_class = (
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
        if dense
        else (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
    )
    config = config_class(
        text_config=settings | (text or {}),
        vision_config={
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 0.25,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = PATCH * MERGE
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": side**2, "longest_edge": 64 * side**2}
    ).save_pretrained(folder)
    space = {"tiers": ["low", "medium", "high"], "top_ks": [1] if dense else [1, 2, 3], "num_blocks": [3, 4, 5, 6]}
    values = {
        "vision_budgets": {"low": 4 * side**2, "medium": 9 * side**2, "high": 16 * side**2},
        "removal": [4, 2, 3],
        "max_new_tokens": 6,
        "knob_space": space,
    }
    (folder / "elastic.json").write_text(json.dumps(values | elastic))
    return folder


class Nothing(torch.nn.Module):
    """Stands for a layer that is left out."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def eager_experts(adapter: Qwen3VLAdapter) -> None:
    """The pretended device has no grouped product: transformers would count experts there as a GPU does."""
    if adapter.num_experts > 1:
        adapter.model.set_experts_implementation("eager")


@contextmanager
def changed(adapter: Qwen3VLAdapter, removed: Collection[int], top_ks: Sequence[int] | None) -> Iterator[None]:
    eager_experts(adapter)
    layers = adapter.model.model.language_model.layers
    kept, trained = list(layers), adapter.trained_top_k
    try:
        for block, layer in enumerate(kept):
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.top_k = trained if top_ks is None else top_ks[block]
            if block in removed:
                layers[block] = Nothing()
        yield
    finally:
        for block, layer in enumerate(kept):
            layers[block] = layer
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.top_k = trained


@torch.no_grad()
def transformers_pass(
    adapter: Qwen3VLAdapter,
    prompt: EmbeddedPrompt,
    behind: Tensor,
    removed: Collection[int],
    top_ks: Sequence[int] | None,
) -> tuple[list[Tensor], Tensor]:
    """See `reference_pass`: transformers' own text model, given what the blocks read."""
    more = torch.arange(len(behind), device=behind.device)[:, None].expand(-1, 3) + prompt.next_position
    positions = torch.cat([prompt.positions, more]).T[:, None]
    visual, depths = None, None
    if prompt.added:
        visual = prompt.added[0].abs().sum(-1) > 0
        depths = [prompt.added[block][visual] for block in range(len(prompt.added))]
        visual = F.pad(visual, (0, len(behind)))[None]
    text, streams = adapter.model.model.language_model, []
    with changed(adapter, removed, top_ks):
        # What a layer reads is the stream behind the one before, with what is added there.
        hooks = [
            module.register_forward_pre_hook(lambda _, args: streams.append(args[0][0]))
            for module in (*text.layers, text.norm)
        ]
        out = text(
            inputs_embeds=torch.cat([prompt.hidden, behind])[None],
            position_ids=positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=depths,
            use_cache=False,
        )
        for hook in hooks:
            hook.remove()
    states = [streams[block + 1] for block in range(adapter.num_blocks) if block not in removed]
    return states, adapter.model.lm_head(out.last_hidden_state[0])


def naive_experts(adapter: Qwen3VLAdapter, block: int, x: Tensor, top_k: int) -> Tensor:
    """One token after the other, one expert after the other; `x` is `(tokens, d_model)`."""
    layer, out = adapter.model.model.language_model.layers[block], []
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    for token in x:
        y = token / (token.square().mean() + norm.variance_epsilon).sqrt() * norm.weight
        if not hasattr(mlp, "gate"):
            out.append(mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ y) * (mlp.up_proj.weight @ y)))
            continue
        best = (mlp.gate.weight @ y).softmax(-1).topk(top_k)
        mixed = torch.zeros_like(token)
        for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ y).chunk(2)
            mixed = mixed + weight * (mlp.experts.down_proj[expert] @ (F.silu(gate) * up))
        out.append(mixed)
    return torch.stack(out)


def transformers_inputs(
    adapter: Qwen3VLAdapter, image: Image.Image | None, question: str, budget: int
) -> dict[str, Any]:
    """What transformers' model is given, made from the text of the chat template and not from the adapter's parts."""
    eager_experts(adapter)
    inputs: dict[str, Any] = {}
    picture = ""
    if image is not None:
        size = {"shortest_edge": PATCH**2 * MERGE**2, "longest_edge": budget}
        inputs = dict(adapter.image_processor(images=image, size=size, return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // MERGE**2
        picture = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
    text = f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(adapter.tokenizer(text)["input_ids"])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image is not None:
        inputs["mm_token_type_ids"] = (ids == adapter.model.config.image_token_id).int()
    return inputs
