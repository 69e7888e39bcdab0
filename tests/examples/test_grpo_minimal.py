import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "grpo_minimal.py"
    spec = importlib.util.spec_from_file_location("grpo_minimal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_steps_beat_random_and_nothing_beats_the_oracle(example):
    torch.manual_seed(0)
    policy = example.Policy()
    before = example.evaluate(policy, 500)
    example.train(policy, 100)
    after = example.evaluate(policy, 500)

    def mean(values):
        return sum(values) / len(values)

    assert mean(after["learned"]) > mean(after["random"]) + 0.15
    assert mean(after["learned"]) > mean(before["learned"]) + 0.1
    for name in ("random", "best static", "learned"):
        assert all(value <= best + 1e-6 for value, best in zip(after[name], after["oracle"], strict=True))


def test_policy_gives_no_probability_to_what_cannot_arrive_in_time(example):
    torch.manual_seed(1)
    request = example.sample_requests(64)
    with torch.no_grad():
        log_pi1, log_pi2 = example.Policy()(*request)
    probability = log_pi1.exp()[..., None] * log_pi2.exp()
    late = request[2][:, None, None] < example.UPPER_BOUND_MS
    assert late.any()
    assert (probability[late] == 0).all()
    torch.testing.assert_close(probability.sum((1, 2)), torch.ones(64))


def test_toy_latency_grows_with_every_knob_and_every_budget_has_a_choice(example):
    table = example.LATENCY_MS.reshape(len(example.TIERS), len(example.TOP_KS), len(example.NUM_BLOCKS))
    for axis in range(3):
        assert (table.diff(dim=axis) > 0).all()
    for budget_ms in example.BUDGETS_MS:
        feasible = budget_ms >= example.UPPER_BOUND_MS
        assert feasible.any()
        assert not feasible.all()
