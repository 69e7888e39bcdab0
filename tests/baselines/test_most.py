from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pacevlm.baselines.most import MostPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import KnobSpace


def test_the_highest_feasible_bound_runs_whatever_the_price(
    space: KnobSpace, make_request: Callable[..., PolicyInput]
) -> None:
    policy, generator = MostPolicy(space), np.random.default_rng(0)
    for number in range(50):
        mask = generator.uniform(size=len(space)) < 0.5
        bounds_ms = generator.integers(1, 9, space.shape).astype(float)
        request = make_request(mask, price=float(number))
        request = dataclasses.replace(request, bounds_ms=bounds_ms)
        chosen = space.place(policy.choose(request))
        assert request.feasible[chosen]
        assert bounds_ms[chosen] == bounds_ms[request.feasible].max()
