import pytest
import torch

from pacevlm.errors import BudgetError, ConfigError, DataError, KnobError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.training.reward import RewardConfig, compute_reward, relative_cost

ACCURACY = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.25]])
LATENCY_MS = torch.tensor([[50.0, 100.0, 150.0], [10.0, 20.0, 30.0]])
BUDGET_MS = torch.tensor([[100.0], [20.0]])


def test_default_reward_is_the_accuracy_and_the_cost_the_violation():
    terms = compute_reward(ACCURACY, LATENCY_MS, BUDGET_MS, RewardConfig())
    assert torch.equal(terms.reward, ACCURACY)
    assert torch.equal(terms.cost, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))  # a budget just met is met
    assert torch.equal(terms.violation, terms.cost)


def test_overshoot_cost_is_relative_to_the_budget():
    terms = compute_reward(ACCURACY, LATENCY_MS, BUDGET_MS, RewardConfig(cost="overshoot"))
    torch.testing.assert_close(terms.cost, torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5]]))
    assert torch.equal(terms.violation, (terms.cost > 0).float())


def test_optional_terms_add_up():
    knob_cost = torch.full_like(ACCURACY, 0.5)
    config = RewardConfig(violation_penalty=2.0, complexity_penalty=0.2)
    reward = compute_reward(ACCURACY, LATENCY_MS, BUDGET_MS, config, knob_cost=knob_cost).reward
    violation = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(reward, ACCURACY - 2.0 * violation - 0.1)


def test_time_costs_its_price_in_points_per_full_latency():
    prices = torch.tensor([[0.0], [10.0]], dtype=torch.float64)
    reward = compute_reward(ACCURACY, LATENCY_MS, BUDGET_MS, RewardConfig(), prices=prices, full_ms=40.0).reward
    assert torch.equal(reward[0], ACCURACY[0])
    torch.testing.assert_close(reward[1], ACCURACY[1] - 0.1 * torch.tensor([0.25, 0.5, 0.75]))
    # A machine that is twice as slow, its full latency measured there, earns the same.
    slow = compute_reward(ACCURACY, 2 * LATENCY_MS, 2 * BUDGET_MS, RewardConfig(), prices=prices, full_ms=80.0)
    assert torch.equal(slow.reward, reward)


def test_relative_cost_grows_with_every_knob_and_ends_at_one():
    space = KnobSpace()
    cost = torch.tensor([relative_cost(knobs, space) for knobs in space], dtype=torch.float64).reshape(space.shape)
    assert cost[-1, -1, -1] == 1.0
    assert cost.min() > 0
    for axis in range(cost.ndim):
        assert (cost.diff(dim=axis) > 0).all()
    with pytest.raises(KnobError, match="top_k one of"):
        relative_cost(Knobs("low", 3, 12), space)


@pytest.mark.parametrize(
    ("accuracy", "latency", "budget", "error"),
    [
        (1.5, 10.0, 20.0, DataError),
        (float("nan"), 10.0, 20.0, DataError),
        (1.0, -1.0, 20.0, DataError),
        (1.0, float("inf"), 20.0, DataError),
        (1.0, 10.0, 0.0, BudgetError),
        (1.0, 10.0, float("nan"), BudgetError),
    ],
)
def test_impossible_values_are_refused(accuracy, latency, budget, error):
    values = (torch.tensor([[value]]) for value in (accuracy, latency, budget))
    with pytest.raises(error):
        compute_reward(*values, RewardConfig())


def test_shapes_and_missing_knob_cost_are_refused():
    with pytest.raises(DataError, match="broadcast"):
        compute_reward(ACCURACY, LATENCY_MS, torch.tensor([100.0, 20.0]), RewardConfig())
    with pytest.raises(DataError, match="latency_ms has shape"):
        compute_reward(ACCURACY, LATENCY_MS[:1], BUDGET_MS, RewardConfig())
    with pytest.raises(ConfigError, match="knob_cost"):
        compute_reward(ACCURACY, LATENCY_MS, BUDGET_MS, RewardConfig(complexity_penalty=0.1))


@pytest.mark.parametrize(
    "values", [{"cost": "latency"}, {"violation_penalty": -1.0}, {"complexity_penalty": float("inf")}]
)
def test_settings_are_checked(values):
    with pytest.raises(ConfigError):
        RewardConfig(**values)
