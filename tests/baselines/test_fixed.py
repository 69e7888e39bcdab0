import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.ranking import rank_by_mean, served_accuracy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, IdentityError, KnobError
from pacevlm.knobs import Knobs, KnobSpace

Request = Callable[..., PolicyInput]


def test_the_wanted_knobs_run_wherever_they_are_admitted(space: KnobSpace, make_request: Request) -> None:
    policy = FixedPolicy(Knobs("high", 4, 14), space)
    generator = np.random.default_rng(0)
    for _ in range(30):
        mask = generator.uniform(size=len(space)) < 0.5
        mask[space.index(policy.knobs)] = True
        assert policy.choose(make_request(mask)) == policy.knobs
        mask[space.index(policy.knobs)] = False
        request = make_request(mask)
        assert request.feasible.reshape(-1)[space.index(policy.choose(request))]


def test_without_a_fitted_preference_the_nearest_configuration_is_the_fallback(
    space: KnobSpace, make_request: Request
) -> None:
    policy = FixedPolicy(Knobs("high", 8, 16), space)
    mask = np.ones(space.shape, dtype=bool)
    mask[1, 1, 2] = False
    assert policy.choose(make_request(mask)) == Knobs("high", 8, 14)
    mask[1, 1, :] = False
    assert policy.choose(make_request(mask)) == Knobs("high", 4, 16)


def test_fitting_finds_the_best_single_configuration(space: KnobSpace, table: dict[str, np.ndarray]) -> None:
    policy = FixedPolicy.fit(space, table["budgets_ms"], table["accuracy"], table["feasible"])
    feasible = table["feasible"].copy()
    feasible[~feasible.any(axis=2), 0] = True
    ranking = rank_by_mean(table["accuracy"])

    def value(index: int) -> float:
        order = np.array([index, *(other for other in ranking if other != index)])
        return float(np.mean([served_accuracy(table["accuracy"], mask, order) for mask in feasible]))

    values = [value(index) for index in range(len(space))]
    assert value(space.index(policy.knobs)) == pytest.approx(max(values), abs=1e-12)
    assert min(values) < max(values)
    assert policy.order[0] == space.index(policy.knobs)


def test_saved_and_loaded_policies_are_equal(
    space: KnobSpace, table: dict[str, np.ndarray], tmp_path: Path, reseal: Callable
) -> None:
    path = tmp_path / "fixed.json"
    policy = FixedPolicy.fit(space, table["budgets_ms"], table["accuracy"], table["feasible"])
    policy.save(path)
    loaded = FixedPolicy.load(path, space)
    assert loaded.knobs == policy.knobs
    np.testing.assert_array_equal(loaded.order, policy.order)
    with pytest.raises(IdentityError):
        FixedPolicy.load(path, KnobSpace())
    reseal(path, {**json.loads(path.read_text()), "knobs": "low/5/12"})
    with pytest.raises(CheckpointError, match="malformed"):
        FixedPolicy.load(path, space)


def test_knobs_outside_the_space_are_refused(space: KnobSpace) -> None:
    with pytest.raises(KnobError, match="not in this space"):
        FixedPolicy(Knobs("medium", 4, 12), space)
