"""A MolmoE model of a few thousand weights, none of which is near a trivial value."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration

TINY: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 4,
    "vocab_size": 56,
    "embedding_size": 64,
    "additional_vocab_size": 8,
    "moe_num_experts": 6,
    "moe_top_k": 3,
    "max_position_embeddings": 512,
    "vit_layers": [-1, -3],
    "max_crops": 4,
    "overlap_margins": [2, 2],
    "vision_backbone": {
        "image_default_input_size": [32, 32],
        "image_patch_size": 4,
        "image_pos_patch_size": 4,
        "image_emb_dim": 24,
        "image_num_heads": 2,
        "image_num_key_value_heads": 2,
        "image_num_layers": 3,
        "image_head_dim": 12,
        "image_mlp_dim": 40,
        "image_num_pos": 65,
    },
}


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Give every parameter random values: around 1 the weights of norms, around 0 all others."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MolmoEForConditionalGeneration]:
    """Build the tiny model, with the given fields of its configuration changed."""

    def make(seed: int = 0, **changes: Any) -> MolmoEForConditionalGeneration:
        model = MolmoEForConditionalGeneration(MolmoEConfig(**{**TINY, **changes})).eval()
        randomise(model, seed)
        return model

    return make


@pytest.fixture(scope="session", name="randomise")
def randomise_fixture() -> Callable[..., None]:
    """Give every parameter of a module random values."""
    return randomise


@pytest.fixture
def tiny_settings() -> dict[str, Any]:
    """Configuration fields of the tiny model."""
    return {**TINY, "vision_backbone": dict(TINY["vision_backbone"])}


@pytest.fixture(scope="session")
def random_sizes() -> Callable[..., list[tuple[int, int]]]:
    """Draw image sizes evenly in the logarithm, so that small and elongated ones are common."""

    def draw(count: int, largest: int, seed: int = 0) -> list[tuple[int, int]]:
        rng = random.Random(seed)
        return [tuple(int(largest ** rng.random()) for _ in range(2)) for _ in range(count)]

    return draw
