"""The stages on arrays give what the modules give."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pacevlm.controller.array_stages import ArrayStage1, ArrayStage2, ArrayToken
from pacevlm.controller.features import time_costs
from pacevlm.controller.policy import Controller
from pacevlm.images import open_picture

SETTINGS = [{}, {"thumbnail": True}, {"pairwise": False, "feasible_fractions": False}, {"hidden_dim": 7}]


@pytest.fixture(params=SETTINGS, ids=str)
def controller(request: pytest.FixtureRequest, make_controller: Callable) -> Controller:
    controller = make_controller(seed=1, **request.param)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in controller.parameters():
            nn.init.normal_(parameter, std=0.5)
    return controller


@torch.no_grad()
def test_they_compute_what_the_modules_compute(controller: Controller, make_request: Callable) -> None:
    encoder = controller.objective_encoder
    token = ArrayToken(encoder)
    stage1, stage2 = ArrayStage1(controller.stage1), ArrayStage2(controller.stage2)
    generator = np.random.default_rng(0)
    for seed in range(30):
        image = Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        request = make_request(seed, picture=open_picture(image))
        features = controller.stage1_feature_array(request)
        objective = [request.objective]
        objective_features = encoder.feature_array(request.objective)
        output, tier = generator.normal(0, 0.1, controller.d_model).astype(np.float32), int(generator.integers(3))
        pairs = (
            (features, controller.stage1_features([request])[0]),
            (token(objective_features), controller.latency_tokens(objective)[0]),
            (stage1(features), controller.stage1_logits(controller.stage1_features([request]))[0]),
            (
                stage2(output, objective_features, tier, time_costs(request)[tier]),
                controller.stage2_logits(torch.from_numpy(output)[None], [request], [tier])[0],
            ),
        )
        for array, tensor in pairs:
            assert array.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(array), tensor, atol=1e-4, rtol=1e-4)


def test_a_layer_without_counterpart_is_refused(make_controller: Callable) -> None:
    controller = make_controller()
    controller.stage1.hidden = nn.Sequential(nn.Tanh())
    with pytest.raises(TypeError, match="no counterpart"):
        ArrayStage1(controller.stage1)
