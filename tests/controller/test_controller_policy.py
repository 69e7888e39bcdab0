"""The controller as a policy: greedy, within the mask, deterministic."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pacevlm.controller.policy import ControllerPolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import DataError, KnobError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.types import Objective


def decide(policy: ControllerPolicy, request: PolicyInput) -> Knobs:
    tier = policy.choose_tier(request)
    return Knobs(tier, *policy.choose_compute(request, tier, policy.latency_token(request)))


def test_it_is_a_policy(make_controller: Callable) -> None:
    policy = ControllerPolicy(make_controller())
    assert isinstance(policy, Policy)
    assert policy.name == "controller"


def test_every_choice_is_admitted_and_the_best_that_is(
    make_controller: Callable, make_request: Callable, space: KnobSpace
) -> None:
    controller = make_controller(opinionated=True)
    policy = ControllerPolicy(controller)
    chosen = set()
    for seed in range(150):
        request = make_request(seed)
        knobs = decide(policy, request)
        chosen.add(knobs)
        assert request.feasible.reshape(-1)[space.index(knobs)]

        # To rounding: the policy computes one request on arrays, the modules compute batches.
        tier_logits = controller.stage1_logits(controller.stage1_features([request]))[0]
        allowed = request.feasible.any(axis=(1, 2))
        best = tier_logits[torch.tensor(allowed)].max()
        torch.testing.assert_close(tier_logits[space.tiers.index(knobs.tier)], best, atol=1e-5, rtol=0)
        tier = space.tiers.index(knobs.tier)
        outputs = controller.latency_tokens([request.objective])
        pair_logits = controller.stage2_logits(outputs, [request], [tier])[0]
        pair = pair_logits[space.top_ks.index(knobs.top_k), space.num_blocks.index(knobs.num_blocks)]
        best = pair_logits[torch.tensor(request.feasible[tier])].max()
        torch.testing.assert_close(pair, best, atol=1e-5, rtol=0)
    assert len(chosen) > 8


def test_where_one_configuration_is_admitted_it_is_chosen(
    make_controller: Callable, make_request: Callable, space: KnobSpace
) -> None:
    policy = ControllerPolicy(make_controller(opinionated=True))
    for index, knobs in enumerate(space):
        feasible = np.zeros(space.shape, dtype=bool)
        feasible.flat[index] = True
        feasible.setflags(write=False)
        assert decide(policy, make_request(index, feasible=feasible, any_feasible=False)) == knobs


def test_weights_that_are_not_numbers_still_keep_to_the_mask(
    make_controller: Callable, make_request: Callable, space: KnobSpace
) -> None:
    controller = make_controller()
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.fill_(torch.nan)
    policy = ControllerPolicy(controller)
    for seed in range(30):
        request = make_request(seed)
        assert request.feasible.reshape(-1)[space.index(decide(policy, request))]


def test_the_same_request_gets_the_same_answer(make_controller: Callable, make_request: Callable) -> None:
    first, second = (ControllerPolicy(make_controller(seed=3, opinionated=True)) for _ in range(2))
    state = torch.get_rng_state()
    for seed in range(20):
        assert (
            decide(first, make_request(seed)) == decide(second, make_request(seed)) == decide(first, make_request(seed))
        )
    tokens = [
        policy.latency_token(make_request(i, objective=Objective(80.0, price=3.0)))
        for i, policy in enumerate((first, second))
    ]
    assert torch.equal(*tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_records_nothing_for_autograd(make_controller: Callable, make_request: Callable) -> None:
    token = ControllerPolicy(make_controller()).latency_token(make_request(budget_ms=80.0))
    assert token.shape == (12,)
    assert not token.requires_grad


def test_training_on_does_not_change_a_policy_that_was_made(make_controller: Callable, make_request: Callable) -> None:
    controller = make_controller(opinionated=True)
    policy, requests = ControllerPolicy(controller), [make_request(seed) for seed in range(20)]
    before = [decide(policy, request) for request in requests]
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.neg_()
    assert [decide(policy, request) for request in requests] == before
    assert [decide(ControllerPolicy(controller), request) for request in requests] != before


def test_wrong_uses_are_refused(make_controller: Callable, make_request: Callable) -> None:
    policy = ControllerPolicy(make_controller())
    feasible = np.zeros((3, 2, 4), dtype=bool)
    feasible[1] = True
    request, token = make_request(feasible=feasible), torch.zeros(12)
    with pytest.raises(DataError, match="latency token"):
        policy.choose_compute(request, "medium", None)
    with pytest.raises(DataError, match="latency token output has shape"):
        policy.choose_compute(request, "medium", torch.zeros(11))
    with pytest.raises(KnobError, match="'huge'"):
        policy.choose_compute(request, "huge", token)
    with pytest.raises(KnobError, match="admits nothing at tier 'high'"):
        policy.choose_compute(request, "high", token)
    other = make_request(feasible=np.ones((3, 5, 5), dtype=bool))
    with pytest.raises(KnobError, match="own knob space"):
        policy.choose_compute(other, "medium", token)
    with pytest.raises(KnobError, match="own knob space"):
        policy.choose_tier(other)
