"""The controller's networks: shapes, how it starts, what it reads, and where gradients go."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pacevlm.controller.features import tier_costs, time_costs
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.controller.stages import INITIAL_SHARPNESS
from pacevlm.errors import ConfigError, DataError, IdentityError, ImageError, KnobError
from pacevlm.images import open_picture
from pacevlm.knobs import KnobSpace
from pacevlm.types import Objective, RequestSizes, VisionSizes

SETTINGS = [
    {},
    {"feasible_fractions": False, "pairwise": False},
    {"thumbnail": True, "hidden_dim": 16, "num_frequencies": 3},
]


def changed(request: PolicyInput, **values: Any) -> PolicyInput:
    """The request with other looks, objective or mask."""
    looks = {name: values.pop(name) for name in list(values) if hasattr(request.view, name)}
    return dataclasses.replace(request, view=dataclasses.replace(request.view, **looks), **values)


def with_images(requests: list[PolicyInput]) -> list[PolicyInput]:
    return [
        changed(request, picture=open_picture(Image.new("RGB", (40, 30), (20 * i, 90, 5))))
        for i, request in enumerate(requests)
    ]


def both_stages(controller: Controller, requests: list[PolicyInput]) -> tuple[torch.Tensor, torch.Tensor]:
    objectives = [request.objective for request in requests]
    outputs = controller.latency_tokens(objectives)
    tiers = [i % 3 for i in range(len(requests))]
    tier_logits = controller.stage1_logits(controller.stage1_features(requests))
    return tier_logits, controller.stage2_logits(outputs, requests, tiers)


@pytest.mark.parametrize("settings", SETTINGS)
def test_shapes(make_controller: Callable, make_request: Callable, space: KnobSpace, settings: dict) -> None:
    controller = make_controller(**settings)
    requests = with_images([make_request(seed) for seed in range(5)])
    tier_logits, pair_logits = both_stages(controller, requests)
    assert tier_logits.shape == (5, 3)
    assert pair_logits.shape == (5, 2, 4)
    assert controller.latency_tokens([Objective(10.0), Objective(20.0, price=3.0)]).shape == (2, 12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_untrained_policy_is_near_uniform_over_the_mask(
    make_controller: Callable, make_request: Callable, settings: dict
) -> None:
    controller = make_controller(**settings)
    requests = with_images([make_request(seed, objective=Objective(20.0 + 3 * seed)) for seed in range(50)])
    masks = torch.tensor(np.stack([request.feasible for request in requests]))
    features = controller.stage1_features(requests)
    tier_mask = masks.flatten(2).any(dim=2)
    tiers = tier_mask.int().argmax(dim=1)
    compute_mask = masks[torch.arange(50), tiers]
    outputs = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    for logits, mask in (
        (controller.stage1_logits(features, tier_mask), tier_mask),
        (controller.stage2_logits(outputs, requests, tiers, compute_mask).flatten(1), compute_mask.flatten(1)),
    ):
        probabilities = logits.softmax(dim=1)
        uniform = mask / mask.sum(dim=1, keepdim=True)
        assert (probabilities[~mask] == 0).all()
        assert (probabilities / uniform)[mask].sub(1).abs().max() < 0.2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "opinionated"), [(torch.float64, 1e-12, True), (torch.float32, 1e-6, False)]
)
def test_a_batch_gives_every_row_what_it_gets_alone(
    make_controller: Callable,
    make_request: Callable,
    settings: dict,
    dtype: torch.dtype,
    tolerance: float,
    opinionated: bool,
) -> None:
    controller = make_controller(opinionated=opinionated, **settings).to(dtype)
    requests = with_images([make_request(seed) for seed in range(9)])
    objectives = [request.objective for request in requests]
    tiers = [i % 3 for i in range(9)]
    tokens = controller.latency_tokens(objectives)
    tier_logits, pair_logits = both_stages(controller, requests)
    assert tier_logits.dtype == pair_logits.dtype == dtype
    assert tier_logits.std() > (0.1 if opinionated else 1e-3)
    for i, request in enumerate(requests):
        one_tier = controller.stage1_logits(controller.stage1_features([request]))
        one_token = controller.latency_tokens([objectives[i]])
        one_pair = controller.stage2_logits(tokens[i : i + 1], [request], [tiers[i]])
        for alone, batched in ((one_tier, tier_logits), (one_token, tokens), (one_pair, pair_logits)):
            torch.testing.assert_close(alone[0], batched[i], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "change",
    [
        {"objective": Objective(77.0)},
        {"objective": Objective(55.0, price=7.0)},
        {"question_embedding": torch.linspace(-1, 1, 12)},
        {"image_size": (333, 444)},
        {"sizes": RequestSizes((VisionSizes(2, 30), VisionSizes(3, 40), VisionSizes(9, 90)), 12, 100)},
        {"feasible": np.eye(3, 8, dtype=bool).reshape(3, 2, 4)},
        {"picture": open_picture(Image.new("RGB", (8, 8), (255, 0, 0)))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_stage1_reads_everything_that_it_should(
    make_controller: Callable, make_request: Callable, change: dict
) -> None:
    controller = make_controller(opinionated=True, thumbnail=True)
    request = make_request(1, picture=open_picture(Image.new("RGB", (8, 8))), objective=Objective(55.0))
    before, after = controller.stage1_logits(controller.stage1_features([request, changed(request, **change)]))
    assert not torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("thumbnail", {"picture": open_picture(Image.new("RGB", (8, 8), (255, 0, 0)))}),
        ("feasible_fractions", {"feasible": np.eye(3, 8, dtype=bool).reshape(3, 2, 4)}),
    ],
)
def test_what_is_switched_off_is_not_read(
    make_controller: Callable, make_request: Callable, setting: str, change: dict
) -> None:
    controller = make_controller(opinionated=True, **{setting: False})
    request = make_request(1, objective=Objective(80.0))
    before, after = controller.stage1_features([request, changed(request, **change)])
    assert torch.equal(before, after)


def test_stage2_reads_token_budget_tier_and_price(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller(opinionated=True)
    outputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    outputs[1:4] = outputs[0]
    objectives = [Objective(80.0), Objective(90.0), Objective(80.0), Objective(80.0, price=5.0), Objective(80.0)]
    requests = [make_request(1, objective=objective) for objective in objectives]
    logits = controller.stage2_logits(outputs, requests, torch.tensor([0, 0, 1, 0, 0]))
    for other in logits[1:]:
        assert not torch.allclose(logits[0], other, atol=1e-4)


def test_what_time_costs_is_taken_off_in_both_stages(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller()  # as it starts, its learned scores are near 0
    free, dear = (make_request(3, objective=Objective(80.0, price=price)) for price in (0.0, 50.0))
    assert not time_costs(free).any()
    shares = dear.bounds_ms / dear.bounds_ms[-1, -1, -1]
    np.testing.assert_allclose(time_costs(dear), 0.5 * shares, rtol=1e-6)
    admitted = [shares[i][dear.feasible[i]].mean() if dear.feasible[i].any() else 0.0 for i in range(3)]
    np.testing.assert_allclose(tier_costs(dear), 0.5 * np.array(admitted), rtol=1e-5)
    # A guardrail twice as tight, and one that promises nothing.
    assert np.array_equal(time_costs(changed(dear, bounds_ms=2 * dear.bounds_ms)), time_costs(dear))
    assert not time_costs(changed(dear, bounds_ms=np.full(shares.shape, np.inf))).any()
    tiers = controller.stage1_logits(controller.stage1_features([free, dear]))
    pairs = controller.stage2_logits(torch.zeros(2, 12), [free, dear], [1, 1])
    for logits, costs in ((tiers, tier_costs(dear)), (pairs, time_costs(dear)[1])):
        moved = (logits[1] - logits[0]).detach()
        torch.testing.assert_close(moved, -INITIAL_SHARPNESS * torch.from_numpy(costs), atol=0.15, rtol=0)


def test_a_sharpness_beyond_all_bounds_is_held(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller()
    with torch.no_grad():
        controller.stage1.sharpness.bias.fill_(1e6)
        controller.stage2.sharpness.bias.fill_(1e6)
    requests = [make_request(seed, objective=Objective(80.0, price=1000.0)) for seed in range(3)]
    policy = ControllerPolicy(controller)
    for request, logits in zip(requests, controller.stage2_logits(torch.zeros(3, 12), requests, [2] * 3), strict=True):
        assert logits.isfinite().all()
        tier = controller.knob_space.tiers.index(policy.choose_tier(request))
        admitted = request.feasible.any(axis=(1, 2))
        assert tier_costs(request)[tier] == tier_costs(request)[admitted].min()


@pytest.mark.parametrize("pairwise", [False, True])
def test_only_the_pair_term_goes_beyond_a_sum_of_two_heads(
    make_controller: Callable, make_request: Callable, pairwise: bool
) -> None:
    controller = make_controller(opinionated=True, pairwise=pairwise)
    requests = [make_request(1, objective=Objective(ms)) for ms in (50.0, 80.0, 120.0)]
    logits = controller.stage2_logits(torch.randn(3, 12), requests, [0, 1, 2])
    interaction = (
        logits - logits.mean(dim=1, keepdim=True) - logits.mean(dim=2, keepdim=True) + logits.mean((1, 2), True)
    )
    assert (interaction.abs().max() > 0.1) == pairwise


def test_gradients_reach_the_encoder_through_the_latency_token_alone(
    make_controller: Callable, make_request: Callable
) -> None:
    controller = make_controller()
    requests = [make_request(seed) for seed in range(4)]
    objectives = [request.objective for request in requests]
    # Stands for the frozen first block: differentiable, with no weights that are trained.
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    first_block = lambda tokens: tokens + torch.tanh(tokens @ mix)  # noqa: E731
    encoder = dict(controller.objective_encoder.named_parameters())

    outputs = first_block(controller.latency_tokens(objectives))
    controller.stage2_logits(outputs, requests, [0, 1, 2, 0])[:, 0, 0].sum().backward()
    for name, parameter in (*encoder.items(), *controller.stage2.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(encoder[name].grad.abs().sum() > 0 for name in encoder if name != "log_scale")
    assert encoder["log_scale"].grad.abs() > 0  # tanh makes the scale matter behind the norm

    controller.zero_grad()
    controller.stage1_logits(controller.stage1_features(requests))[:, 0].sum().backward()
    assert all(parameter.grad is None for parameter in encoder.values())
    assert all(parameter.grad is not None for parameter in controller.stage1.parameters())


def test_stages_can_be_trained(make_controller: Callable, make_request: Callable) -> None:
    """A few steps teach both stages to spend a large budget and to save under a small one."""
    controller = make_controller()
    objectives = [Objective(40.0), Objective(160.0)] * 8
    requests = [make_request(seed, objective=objective) for seed, objective in enumerate(objectives)]
    features = controller.stage1_features(requests)
    tier_target, pair_target = torch.tensor([0, 2] * 8), torch.tensor([0, 7] * 8)
    optimizer = torch.optim.Adam(controller.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        tier_logits = controller.stage1_logits(features)
        pair_logits = controller.stage2_logits(controller.latency_tokens(objectives), requests, tier_target)
        loss = torch.nn.functional.cross_entropy(tier_logits, tier_target)
        (loss + torch.nn.functional.cross_entropy(pair_logits.flatten(1), pair_target)).backward()
        optimizer.step()
    assert torch.equal(tier_logits.argmax(1), tier_target)
    assert torch.equal(pair_logits.flatten(1).argmax(1), pair_target)


def test_features_are_finite_and_of_order_one(make_controller: Callable, make_request: Callable) -> None:
    requests = [make_request(seed) for seed in range(50)]
    requests.append(make_request(1, image_size=(1, 100_000), sizes=RequestSizes((VisionSizes(0, 0),) * 3, 0, 100_000)))
    features = make_controller().stage1_features(requests)
    assert features.isfinite().all()
    assert features[:50].abs().max() < 8


def test_half_precision_and_frozen_inputs_are_taken(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller(opinionated=True)
    feasible = np.ones((3, 2, 4), dtype=bool)
    feasible.setflags(write=False)
    question = torch.linspace(-1, 1, 12, dtype=torch.bfloat16)
    features = controller.stage1_features([make_request(question_embedding=question, feasible=feasible)])
    assert features.dtype == torch.float32
    outputs = torch.linspace(-1, 1, 12, dtype=torch.bfloat16)[None]
    assert controller.stage2_logits(outputs, [make_request()], [1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feasible": np.ones((3, 2, 3), dtype=bool)}, KnobError, "own knob space"),
        ({"sizes": RequestSizes((VisionSizes(1, 1),), 1, 1)}, KnobError, "sizes of 1 tiers"),
        ({"question_embedding": torch.zeros(13)}, IdentityError, "width 12"),
        ({"image_size": (0, 10)}, ImageError, "0x10"),
    ],
)
def test_requests_of_another_kind_are_refused(
    make_controller: Callable, make_request: Callable, change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_controller().stage1_features([make_request(), make_request(1, **change)])


def test_a_thumbnail_needs_an_image(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller(thumbnail=True)
    with pytest.raises(ImageError, match="thumbnail=False"):
        controller.stage1_features([make_request()])
    colour = make_request(picture=open_picture(Image.new("RGB", (100, 10), (7, 7, 7))))
    grey = make_request(picture=open_picture(Image.new("L", (100, 10), 7)))
    assert torch.equal(*controller.stage1_features([colour, grey]))


def test_tensors_of_other_shapes_are_refused(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller()
    with pytest.raises(DataError, match="at least one"):
        controller.stage1_features([])
    with pytest.raises(DataError, match="stage-1 features"):
        controller.stage1_logits(torch.zeros(2, 3))
    for outputs, tiers in ((torch.zeros(2, 11), [0, 0]), (torch.zeros(1, 12), [0, 0]), (torch.zeros(2, 12), [0])):
        with pytest.raises(DataError, match="latency token outputs"):
            controller.stage2_logits(outputs, [make_request()] * 2, tiers)
    for tier in (-1, 3):
        with pytest.raises(KnobError, match=r"0\.\.2"):
            controller.stage2_logits(torch.zeros(1, 12), [make_request()], [tier])


@pytest.mark.parametrize(
    "settings",
    [
        {"embedding_scale": 0.0},
        {"embedding_scale": math.inf},
        {"embedding_scale": "1"},
        {"hidden_dim": 0},
        {"hidden_dim": 1.5},
        {"num_frequencies": True},
        {"thumbnail": 1},
    ],
)
def test_impossible_controller_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ControllerConfig(**{"reference_ms": 100.0, "embedding_scale": 1.0, **settings})


def test_settings_survive_a_dictionary_and_strangers_do_not() -> None:
    config = ControllerConfig(reference_ms=90.0, embedding_scale=0.5, thumbnail=True)
    assert ControllerConfig.from_dict(config.to_dict()) == config
    for values in ({**config.to_dict(), "depth": 3}, {"reference_ms": 90.0}, [1]):
        with pytest.raises(ConfigError, match="has the settings"):
            ControllerConfig.from_dict(values)


def test_masks_and_outputs_may_be_on_any_device(
    make_controller: Callable, make_request: Callable, other_device: str
) -> None:
    requests = with_images([make_request(seed) for seed in range(5)])
    masks = torch.tensor(np.stack([request.feasible for request in requests]))
    tier_mask = masks.flatten(2).any(dim=2)
    tiers = tier_mask.int().argmax(dim=1)
    outputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))

    def logits(controller: Controller, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        features, compute_mask = controller.stage1_features(requests), masks[torch.arange(5), tiers]
        tier_logits = controller.stage1_logits(features, tier_mask.to(device))
        return tier_logits, controller.stage2_logits(
            outputs.to(device), requests, tiers.to(device), compute_mask.to(device)
        )

    expected = logits(make_controller(opinionated=True), "cpu")
    controller = make_controller(opinionated=True).to(other_device)
    for device in ("cpu", other_device):
        found = logits(controller, device)
        assert all(values.device.type == other_device for values in found)
        torch.testing.assert_close([values.cpu() for values in found], list(expected), atol=1e-5, rtol=1e-5)
