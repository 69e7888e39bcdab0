"""Models of every transformers family with random weights at stated sizes, made in memory on the device itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pacevlm.knobs import KnobSpace
from pacevlm.models.adapter import Adapter
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.qwen3_vl_moe.adapter import Qwen3VLMoeAdapter

QWEN_SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEXTS = ["Which number is the largest? 407", "How many red digits are there?", "user assistant"] * 20
SIZES = ("small", "large", "big")
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class RandomFamily:
    """How a family is made and asked without pacevlm.

    Attributes:
        build: the adapter of a random model of a size, on a device, of a dtype.
        inputs: what transformers' `generate` takes for a prepared request.
        edited: the model with some blocks taken out and smaller top_ks, for as long as the context lasts.
    """

    build: Callable[[str, torch.device, torch.dtype], Adapter[Any, Any]]
    inputs: Callable[[Any], dict[str, Tensor | None]]
    edited: Callable[[Any, Collection[int], Sequence[int]], Any]


def random_model(family: str, size: str, device: str, dtype: torch.dtype) -> ElasticModel:
    """A random model made elastic, blocks leaving from the last one on."""
    adapter = FAMILIES[family].build(size, torch.device(device), dtype)
    budgets = dict(adapter.default_vision_budgets)
    if size != "big" and hasattr(adapter, "token_side"):
        counts = (16, 36, 64)
        budgets = {tier: count * adapter.token_side**2 for tier, count in zip(budgets, counts, strict=True)}
    return ElasticModel(
        adapter,
        KnobSpace.for_model(tuple(budgets), adapter.trained_top_k, adapter.num_blocks),
        budgets,
        BlockOrder.early_exit(adapter.num_blocks, adapter.fixed_blocks),
        f"random {family} {size}",
        max_new_tokens=MAX_NEW_TOKENS,
    )


def small_tokenizer(special: Sequence[str], **named: Any) -> PreTrainedTokenizerFast:
    """Bytes, a few merges, and a family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@contextmanager
def on_device(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside lie on the device and have the dtype from the start; seeded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


class _Nothing(torch.nn.Module):
    """Stands for a layer that is left out."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@contextmanager
def without_blocks(layers: torch.nn.ModuleList, removed: Collection[int]) -> Iterator[None]:
    """Some layers replaced by nothing."""
    kept = list(layers)
    try:
        for block in removed:
            layers[block] = _Nothing()
        yield
    finally:
        for block in removed:
            layers[block] = kept[block]


# Qwen3-VL -------------------------------------------------------------------------------------------------------------

# Widths of the 30B-A3B model with twelve of its 48 layers are what `big` is.
QWEN_TEXT: Mapping[str, dict[str, Any]] = {
    "small": {
        **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 64},
        **{"num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 512},
    },
    "large": {
        **{"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4},
        **{"head_dim": 64, "intermediate_size": 2048, "moe_intermediate_size": 384},
        **{"num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 8192},
    },
    "big": {
        **{"hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768},
        **{"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936},
    },
}
QWEN_VISION: Mapping[str, dict[str, Any]] = {
    "small": {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2},
    "large": {"depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4},
    "big": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
}


def qwen_configs(size: str) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """A tokenizer, and the settings of a Qwen3-VL configuration that fits it."""
    tokenizer = small_tokenizer(
        QWEN_SPECIAL,
        eos_token=QWEN_SPECIAL[0],
        pad_token=QWEN_SPECIAL[1],
        extra_special_tokens=list(QWEN_SPECIAL[2:]),
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    head_dim, depth = QWEN_TEXT[size]["head_dim"], QWEN_VISION[size]["depth"]
    sections = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    # A tie between logits of a bfloat16 model is less common the further they lie apart.
    text = QWEN_TEXT[size] | {
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "eos_token_id": ids[QWEN_SPECIAL[0]],
        "initializer_range": 0.05,
    }
    vision = QWEN_VISION[size] | {
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [depth // 4, depth // 2, depth - 1],
    }
    return tokenizer, {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def build_qwen3_vl_moe(size: str, device: torch.device, dtype: torch.dtype) -> Adapter[Any, Any]:
    """A random Qwen3-VL-MoE."""
    tokenizer, settings = qwen_configs(size)
    config = Qwen3VLMoeConfig(**json.loads(json.dumps(settings)))
    with on_device(device, dtype):
        model = Qwen3VLMoeForConditionalGeneration(config)
    return Qwen3VLMoeAdapter(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=16, merge_size=2))


def qwen_inputs(prepared: Any) -> dict[str, Tensor | None]:
    """What `generate` takes."""
    ids = prepared.input_ids[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prepared.patches,
        "image_grid_thw": prepared.grid,
        "mm_token_type_ids": prepared.is_image[None].int(),
    }


@contextmanager
def edited_qwen(adapter: Any, removed: Collection[int], top_ks: Sequence[int]) -> Iterator[None]:
    """See `RandomFamily`."""
    layers = adapter.model.model.language_model.layers
    routers = [layer.mlp.gate if hasattr(layer.mlp, "gate") else None for layer in layers]
    try:
        for router, top_k in zip(routers, top_ks, strict=True):
            if router is not None:
                router.top_k = top_k
        with without_blocks(layers, removed):
            yield
    finally:
        for router in routers:
            if router is not None:
                router.top_k = adapter.trained_top_k


FAMILIES: dict[str, RandomFamily] = {"qwen3_vl_moe": RandomFamily(build_qwen3_vl_moe, qwen_inputs, edited_qwen)}
