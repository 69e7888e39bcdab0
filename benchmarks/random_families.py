"""Models of every transformers family with random weights at stated sizes, made in memory on the device itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pacevlm.knobs import KnobSpace
from pacevlm.models.adapter import Adapter
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.gemma4.adapter import SPECIAL_TOKENS, Gemma4Adapter
from pacevlm.models.qwen3_vl.adapter import Qwen3VLAdapter
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
    if size != "big":
        # As many image tokens as a CPU answers behind in a fraction of a second.
        side = getattr(adapter, "token_side", None)
        counts = (70, 140, 280) if side is None else (16 * side**2, 36 * side**2, 64 * side**2)
        budgets = dict(zip(("low", "medium", "high"), counts, strict=True))
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
    with on_device(device, dtype):
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**settings))
    return Qwen3VLMoeAdapter(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=16, merge_size=2))


def build_qwen3_vl(size: str, device: torch.device, dtype: torch.dtype) -> Adapter[Any, Any]:
    """A random Qwen3-VL without experts, of the same widths."""
    tokenizer, settings = qwen_configs(size)
    with on_device(device, dtype):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings))
    return Qwen3VLAdapter(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=16, merge_size=2))


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


# Gemma 4 --------------------------------------------------------------------------------------------------------------

# Widths of the 26B-A4B model with ten of its 30 layers are what `big` is.
GEMMA_TEXT: Mapping[str, dict[str, Any]] = {
    "small": {
        **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1, "intermediate_size": 128},
        **{"moe_intermediate_size": 64, "num_experts": 16, "top_k_experts": 4, "vocab_size": 512},
        **{"sliding_window": 128},
    },
    "large": {
        **{"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"head_dim": 96, "global_head_dim": 192, "num_global_key_value_heads": 2, "intermediate_size": 768},
        **{"moe_intermediate_size": 384, "num_experts": 16, "top_k_experts": 4, "vocab_size": 8192},
        **{"sliding_window": 256},
    },
    "big": {
        **{"hidden_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 2, "intermediate_size": 2112},
        **{"moe_intermediate_size": 704, "num_experts": 128, "top_k_experts": 8, "vocab_size": 262_144},
        **{"sliding_window": 1024},
    },
}
GEMMA_VISION: Mapping[str, dict[str, Any]] = {
    "small": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    "large": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2},
    "big": {"num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
}
GEMMA_SPECIAL = ("<eos>", "<pad>", *SPECIAL_TOKENS, "<|video|>", "<|audio|>")


def build_gemma4(size: str, device: torch.device, dtype: torch.dtype) -> Adapter[Any, Any]:
    """A random Gemma 4 with experts."""
    tokenizer = small_tokenizer(
        GEMMA_SPECIAL, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=list(GEMMA_SPECIAL[2:])
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in GEMMA_SPECIAL}
    vision = GEMMA_VISION[size]
    text = GEMMA_TEXT[size] | {
        **{"enable_moe_block": True, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
        **{"use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0, "initializer_range": 0.05},
        **{"eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"], "bos_token_id": ids["<bos>"]},
        "max_position_embeddings": 4096,
    }
    heads = vision["num_attention_heads"]
    config = Gemma4Config(
        text_config=text,
        vision_config=vision | {"num_key_value_heads": heads, "head_dim": vision["hidden_size"] // heads},
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
    )
    with on_device(device, dtype):
        model = Gemma4ForConditionalGeneration(config)
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                # A trained layer's scale is not one.
                layer.layer_scalar.fill_(0.9)
    return Gemma4Adapter(model, tokenizer, Gemma4ImageProcessorPil())


def gemma_inputs(prepared: Any) -> dict[str, Tensor | None]:
    """What `generate` takes; without the padding that the image processor adds, which would slow it down."""
    ids = prepared.input_ids[None]
    types = torch.zeros_like(ids)
    types[0, slice(*prepared.span)] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prepared.patches[None],
        "image_position_ids": prepared.places[None],
        "mm_token_type_ids": types,
    }


@contextmanager
def edited_gemma(adapter: Any, removed: Collection[int], top_ks: Sequence[int]) -> Iterator[None]:
    """See `RandomFamily`."""
    layers = adapter.model.model.language_model.layers
    routers = [layer.router for layer in layers]
    config = routers[0].config
    try:
        for router, top_k in zip(routers, top_ks, strict=True):
            router.config = SimpleNamespace(top_k_experts=top_k)
        with without_blocks(layers, removed):
            yield
    finally:
        for router in routers:
            router.config = config


FAMILIES: dict[str, RandomFamily] = {
    "qwen3_vl_moe": RandomFamily(build_qwen3_vl_moe, qwen_inputs, edited_qwen),
    "gemma4": RandomFamily(build_gemma4, gemma_inputs, edited_gemma),
    "qwen3_vl": RandomFamily(build_qwen3_vl, qwen_inputs, edited_qwen),
}
