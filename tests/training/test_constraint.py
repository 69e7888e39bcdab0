import json
import math
import random

import pytest

from pacevlm.errors import CheckpointError, ConfigError, DataError
from pacevlm.training.constraint import ConstraintConfig, PIDLagrangian


def test_each_gain_does_what_the_paper_says():
    rates = [0.5, 0.3, 0.6]
    target = 0.1

    def run(**gains):
        controller = PIDLagrangian(ConstraintConfig(target=target, **{"k_p": 0.0, "k_i": 0.0, "k_d": 0.0, **gains}))
        return [controller.update(rate) for rate in rates]

    assert run(k_p=2.0) == pytest.approx([0.8, 0.4, 1.0])
    assert run(k_i=2.0) == pytest.approx([0.8, 1.2, 2.2])
    assert run(k_d=2.0) == pytest.approx([0.0, 0.0, 0.6])  # only a rise counts
    together = [sum(parts) for parts in zip(run(k_p=2.0), run(k_i=2.0), run(k_d=2.0), strict=True)]
    assert run(k_p=2.0, k_i=2.0, k_d=2.0) == pytest.approx(together)


def test_multiplier_starts_at_zero_and_never_turns_negative():
    generator = random.Random(0)
    controller = PIDLagrangian(ConstraintConfig(target=0.3, k_p=3.0, k_i=0.5, k_d=1.0))
    assert controller.multiplier == 0.0
    values = [controller.update(generator.random() * 0.6) for _ in range(300)]
    assert min(values) == 0.0  # the bound was reached, not merely respected
    assert max(values) > 0.0


def test_integral_is_held_at_both_ends():
    controller = PIDLagrangian(ConstraintConfig(target=0.1, k_p=0.0, k_i=1.0, integral_max=2.0))
    assert [controller.update(1.0) for _ in range(5)][-1] == 2.0
    # The limit is what makes recovery quick: 2.0 / 0.1 updates without violations bring λ to 0.
    assert [controller.update(0.0) for _ in range(21)][-1] == 0.0
    for _ in range(100):
        controller.update(0.0)
    assert controller.update(0.6) == pytest.approx(0.5)  # nothing was saved up below 0


def test_smoothing_filters_p_and_d_but_not_the_integral():
    smooth = PIDLagrangian(ConstraintConfig(target=0.0, k_p=1.0, k_i=0.0, smoothing=0.75))
    assert [smooth.update(rate) for rate in (0.0, 1.0, 1.0)] == pytest.approx([0.0, 0.25, 0.4375])
    integral = PIDLagrangian(ConstraintConfig(target=0.0, k_p=0.0, k_i=1.0, smoothing=0.75))
    assert [integral.update(rate) for rate in (0.0, 1.0, 1.0)] == pytest.approx([0.0, 1.0, 2.0])


def test_closed_loop_settles_at_the_target():
    # A plant whose violation rate falls with the price, as a policy's does. Without the integral it settles above.
    def settle(k_i):
        controller = PIDLagrangian(ConstraintConfig(target=0.05, k_p=0.5, k_i=k_i))
        rate = 0.6
        for _ in range(500):
            rate = 0.6 * math.exp(-controller.update(rate))
        return rate

    assert settle(1.0) == pytest.approx(0.05, abs=1e-8)
    assert settle(0.0) > 0.3


def test_resumed_controller_goes_on_to_the_bit():
    generator = random.Random(1)
    config = ConstraintConfig(target=0.05, k_p=0.7, k_i=0.3, k_d=0.9, smoothing=0.6)
    rates = [generator.random() for _ in range(40)]
    never_stopped = PIDLagrangian(config)
    expected = [never_stopped.update(rate) for rate in rates]
    for stop in (0, 1, 17):
        first = PIDLagrangian(config)
        for rate in rates[:stop]:
            first.update(rate)
        second = PIDLagrangian(config)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert second.multiplier == first.multiplier
        assert [second.update(rate) for rate in rates[stop:]] == expected[stop:]


@pytest.mark.parametrize(
    "change", [{"integral": -1.0}, {"rate": float("nan")}, {"multiplier": "1"}, {"num_updates": 1.5}, {"other": 0.0}]
)
def test_foreign_state_is_refused_and_changes_nothing(change):
    controller = PIDLagrangian(ConstraintConfig())
    controller.update(0.5)
    before = controller.state_dict()
    with pytest.raises(CheckpointError):
        controller.load_state_dict({**before, **change})
    assert controller.state_dict() == before


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(DataError):
        PIDLagrangian(ConstraintConfig()).update(rate)


@pytest.mark.parametrize("values", [{"k_p": -1.0}, {"target": float("nan")}, {"integral_max": 0.0}, {"smoothing": 1.0}])
def test_settings_are_checked(values):
    with pytest.raises(ConfigError):
        ConstraintConfig(**values)
