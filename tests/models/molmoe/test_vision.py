"""The tower and the projector stay finite in half precision, however large their activations grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pacevlm.models.molmoe import MolmoEForConditionalGeneration, vision
from pacevlm.models.molmoe.runtime import frozen_tower
from pacevlm.models.molmoe.runtime.frozen_tower import FrozenTower
from pacevlm.models.molmoe.vision import VisionBackbone, saturate

MakeModel = Callable[..., MolmoEForConditionalGeneration]
MOST = torch.finfo(torch.float16).max


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 64, 48, generator=generator), torch.rand(3, 64, generator=generator)


def grow(backbone: VisionBackbone, what: str, factor: float) -> None:
    """Scale the weights that one kind of activation grows with."""
    blocks = backbone.image_vit.transformer.resblocks
    layers = {
        "residual": [blocks[0].feed_forward.w2],
        "hidden": [blocks[1].feed_forward.w1],
        "scores": [blocks[1].attention.wq, blocks[1].attention.wk],
        "pooled": [backbone.image_pooling_2d.wo],
        "product": [backbone.image_projector.w1, backbone.image_projector.w3],
        "features": [backbone.image_projector.w2],
    }[what]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(factor)


def both_ways(backbone: VisionBackbone) -> list[Tensor]:
    """Features by the modules, and by the weights alone."""
    images, masks = inputs()
    return [backbone(images, masks), backbone(images, masks, FrozenTower(backbone.image_vit))]


GROWN = {"residual": 3e4, "hidden": 3e4, "scores": 1e2, "pooled": 6e4, "product": 1e3, "features": 1e5}


@pytest.mark.parametrize("what", GROWN)
@torch.no_grad()
def test_no_activation_leaves_float16(make_model: MakeModel, what: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        backbone = make_model(seed=1).model.vision_backbone
        grow(backbone, what, GROWN[what])
        for features in both_ways(backbone.to(dtype)):
            assert features.isfinite().all(), dtype


@pytest.mark.parametrize("what", ["residual", "pooled", "product"])
@torch.no_grad()
def test_it_would_without_saturation(make_model: MakeModel, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_model(seed=1).model.vision_backbone
    grow(backbone, what, GROWN[what])
    backbone = backbone.to(torch.float16)
    for module in (vision, frozen_tower):
        monkeypatch.setattr(module, "saturate", lambda x: x)
    for features in both_ways(backbone):
        assert not features.isfinite().all()


@torch.no_grad()
def test_large_activations_within_reach_are_as_in_single_precision(make_model: MakeModel) -> None:
    backbone = make_model(seed=1).model.vision_backbone
    grow(backbone, "residual", 100.0)
    exact = both_ways(backbone)[0]
    assert backbone.vit_features(inputs()[0]).abs().max() > 200
    assert exact.abs().max() > 1000
    for features in both_ways(backbone.to(torch.float16)):
        assert (features.float() - exact).norm() <= 0.005 * exact.norm()


def test_saturation_changes_float16_beyond_its_range_alone() -> None:
    values = torch.tensor([0.0, 1.5, -MOST, MOST, float("inf"), -float("inf")])
    assert torch.equal(saturate(values.half()), torch.tensor([0.0, 1.5, -MOST, MOST, MOST, -MOST]).half())
    for dtype in (torch.float32, torch.bfloat16):
        assert saturate(tensor := values.to(dtype)) is tensor
