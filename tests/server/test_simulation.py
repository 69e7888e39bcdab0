"""Loads played through the queue: sums add up, more devices keep more, and cheaper answers keep more than full ones."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.errors import BudgetError, ConfigError
from pacevlm.knobs import KnobSpace
from pacevlm.server.capacity import CapacityConfig, format_capacity, plan_capacity
from pacevlm.server.simulation import Load, Traffic, simulate
from pacevlm.types import RequestSizes, RequestView, VisionSizes

SPACE = KnobSpace(("low", "high"), (1, 2), (1, 2))
BUDGETS_MS = (40.0, 80.0)


def make_traffic(noise: float = 0.0, number: int = 20) -> Traffic:
    """Cheapest knobs take 10 ms and are right half the time, full ones 24 ms and always."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.9, 1.1, number)[:, None, None, None]
    place = np.arange(len(SPACE)).reshape(SPACE.shape)
    predicted_ms = scale * (10.0 + 2.0 * place)
    dearest_first = LookupTable(SPACE, [1.0], np.arange(len(SPACE))[::-1][None, None, None])
    full = FullPolicy(SPACE)
    sizes = RequestSizes((VisionSizes(1, 1),) * 2, 1, 1)
    return Traffic(
        space=SPACE,
        views=[RequestView(torch.zeros(4), sizes, (1, 1), None)] * number,
        bounds_ms=predicted_ms * (1.0 + 3 * noise),
        expected_ms=predicted_ms,
        real_ms=predicted_ms,
        accuracy=np.broadcast_to(0.5 + place / 14, predicted_ms.shape),
        ratios=1.0 + noise * np.linspace(-1, 1, 11),
        choose={
            "bundle": lambda _, request: dearest_first.choose(request),
            "lookup_table": lambda _, request: dearest_first.choose(request),
            "full": lambda _, request: full.choose(request),
        },
        full_p50_ms=24.0,
        price=0.0,
    )


@pytest.mark.parametrize("policy", ["bundle", "full"])
@pytest.mark.parametrize("load", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_counts_add_up_and_promises_hold(policy: str, load: float, noise: float) -> None:
    traffic = make_traffic(noise)
    settings = Load(load * traffic.capacity_per_s, BUDGETS_MS, policy, num_requests=1000)  # type: ignore[arg-type]
    tally = simulate(traffic, settings)
    assert tally == simulate(traffic, settings)
    assert tally != simulate(traffic, dataclasses.replace(settings, seed=1))
    assert tally.offered == 1000 >= tally.accepted
    assert tally.late <= 0.01 * tally.accepted  # nothing takes more than three quarters of what bounds leave beyond it
    assert 0 < tally.good <= tally.right <= tally.accepted
    assert 0.5 <= tally.accuracy <= 1.0
    assert tally.busy <= 1.05  # what waits when the last one arrives comes on top
    assert tally.span_s == pytest.approx(1000 / settings.requests_per_s, rel=0.1)
    if load == 0.2:
        assert tally.kept_share > 0.9
    if load == 5.0:
        assert tally.busy > 0.8


def test_under_load_answers_get_cheaper_and_more_are_kept_than_with_full_knobs() -> None:
    traffic, accuracy = make_traffic(), []
    for load in (0.1, 1.0, 2.0):
        paced, full = (
            simulate(traffic, Load(load * traffic.capacity_per_s, BUDGETS_MS, policy, num_requests=2000))
            for policy in ("bundle", "full")
        )
        accuracy.append(paced.accuracy)
        assert full.accuracy == pytest.approx(1.0)
        assert paced.kept_share >= full.kept_share
    assert accuracy[0] > 0.98
    assert accuracy == sorted(accuracy, reverse=True)
    assert paced.goodput_per_s > full.goodput_per_s


def test_more_devices_keep_more_until_enough_is_kept() -> None:
    traffic = make_traffic()
    config = CapacityConfig(3 * traffic.capacity_per_s, BUDGETS_MS, kept=0.98, num_requests=1000)
    tallies = plan_capacity(traffic, config)
    kept = [tally.kept_share for tally in tallies]
    assert all(later > earlier - 0.01 for earlier, later in itertools.pairwise(kept))
    assert kept[-2] < 0.98 <= kept[-1]
    assert 3 <= len(tallies) <= 8
    full = plan_capacity(traffic, dataclasses.replace(config, policy="full"))
    assert len(full) >= len(tallies)
    *table, _, last = format_capacity(tallies, config).splitlines()
    assert len(table) == 1 + len(tallies)
    assert last.startswith(f"{len(tallies)} devices answer 0.98 of")


def test_what_no_number_of_devices_can_do_is_said() -> None:
    traffic = make_traffic()
    config = CapacityConfig(10.0, (5.0,), max_devices=3, num_requests=100)
    tallies = plan_capacity(traffic, config)
    assert [tally.accepted for tally in tallies] == [0, 0, 0]
    assert "3 devices do not answer" in format_capacity(tallies, config)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"requests_per_s": 0.0}, ConfigError),
        ({"budgets_ms": ()}, ConfigError),
        ({"budgets_ms": (-1.0,)}, BudgetError),
        ({"kept": 1.5}, ConfigError),
        ({"max_devices": 0}, ConfigError),
        ({"num_requests": 0}, ConfigError),
    ],
)
def test_a_senseless_question_is_refused(values: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        CapacityConfig(**{"requests_per_s": 1.0, "budgets_ms": (10.0,), **values})  # type: ignore[arg-type]
