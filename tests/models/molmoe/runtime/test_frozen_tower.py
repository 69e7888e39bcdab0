"""The vision tower without its modules computes what they compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.runtime.frozen_tower import FrozenTower

MakeModel = Callable[..., MolmoEForConditionalGeneration]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_as_near_to_single_as_the_modules_are(make_model: MakeModel, dtype: torch.dtype) -> None:
    single = make_model(seed=1).model.vision_backbone.image_vit
    half = make_model(seed=1).to(dtype).model.vision_backbone.image_vit
    errors = []
    for seed in range(5):
        patches = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(seed))
        exact = single(patches)
        found = (half(patches.to(dtype)), FrozenTower(half)(patches.to(dtype)))
        errors.append([float((out.float() - exact).norm() / exact.norm()) for out in found])
    modules, frozen = torch.tensor(errors).mean(dim=0).tolist()
    assert 0 < frozen < 1.2 * modules


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("layers", [[-1, -3], [-2], [0, 1]], ids=str)
@torch.no_grad()
def test_weights_alone_do_what_the_modules_do(
    make_model: MakeModel, dtype: torch.dtype, tolerance: float, layers: list[int]
) -> None:
    backbone = make_model(seed=1, vit_layers=layers).to(dtype).model.vision_backbone
    patches = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    masks = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    tower = FrozenTower(backbone.image_vit)
    assert len(tower.layers) == max(layer % 3 for layer in layers) + 1
    expected = backbone.image_vit(patches)
    found = tower(patches)
    assert found.dtype == dtype
    assert found.shape == expected.shape == (3, 64, 24 * len(layers))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    whole = backbone(patches, masks)
    torch.testing.assert_close(
        backbone(patches, masks, tower), whole, rtol=0, atol=tolerance * max(1.0, float(whole.abs().max()))
    )
