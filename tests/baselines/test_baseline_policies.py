"""Laws that hold between the baselines on the same requests."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.baselines.oracle import OraclePolicy
from pacevlm.baselines.random_feasible import RandomFeasiblePolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import DataError, KnobError
from pacevlm.knobs import Knobs, KnobSpace

Request = Callable[..., PolicyInput]


def chosen(policy: Policy, request: PolicyInput) -> Knobs:
    """What both stages choose; none of these policies reads the latency token's output."""
    tier = policy.choose_tier(request)
    return Knobs(tier, *policy.choose_compute(request, tier, None))


@pytest.fixture(scope="module")
def policies(space: KnobSpace, table: dict[str, np.ndarray]) -> dict[str, Policy]:
    fitting = (space, table["budgets_ms"], table["accuracy"], table["feasible"])
    accuracy = {str(i): row for i, row in enumerate(table["accuracy"])}
    latency_ms = {str(i): row for i, row in enumerate(table["latency_ms"])}
    made: list[Policy] = [
        LookupTable.fit(*fitting),
        FixedPolicy.fit(*fitting),
        CheapestPolicy(space),
        RandomFeasiblePolicy(space, seed=3),
        FullPolicy(space),
        OraclePolicy(space, accuracy, latency_ms, 100.0),
    ]
    return {policy.name: policy for policy in made}


@pytest.fixture(scope="module")
def requests(table: dict[str, np.ndarray], make_request: Request) -> list[PolicyInput]:
    return [
        make_request(mask[i], example_id=str(i), budget_ms=float(budget_ms))
        for budget_ms, mask in zip(table["budgets_ms"], table["feasible"], strict=True)
        for i in range(len(mask))
    ]


def test_every_baseline_answers_the_interface_in_two_agreeing_stages(
    policies: dict[str, Policy], requests: list[PolicyInput]
) -> None:
    for policy in policies.values():
        assert isinstance(policy, Policy)
        if not isinstance(policy, OneChoicePolicy):
            continue
        for request in requests[::20]:
            assert policy.latency_token(request) is None
            tier = policy.choose_tier(request)
            assert Knobs(tier, *policy.choose_compute(request, tier, None)) == policy.choose(request)
            other = "low" if tier == "high" else "high"
            with pytest.raises(KnobError, match="cannot go on"):
                policy.choose_compute(request, other, None)


def test_all_but_full_obey_the_guardrail(
    space: KnobSpace, policies: dict[str, Policy], requests: list[PolicyInput]
) -> None:
    for request in requests:
        admitted = request.feasible.reshape(-1)
        for name, policy in policies.items():
            if name != "full":
                assert admitted[space.index(chosen(policy, request))]
        assert chosen(policies["full"], request) == space.full
        assert chosen(policies["cheapest"], request) == space.cheapest


def test_oracle_is_the_ceiling_and_random_the_floor_of_guarded_policies(
    space: KnobSpace,
    table: dict[str, np.ndarray],
    policies: dict[str, Policy],
    requests: list[PolicyInput],
) -> None:
    scores = {
        name: np.array([table["accuracy"][int(r.example_id), space.index(chosen(policy, r))] for r in requests])
        for name, policy in policies.items()
    }
    for name in ("lookup_table", "fixed", "random", "cheapest"):
        assert (scores["oracle"] >= scores[name]).all()
    assert scores["oracle"].mean() > scores["lookup_table"].mean()
    # By construction differences of means of several standard errors.
    for name in ("lookup_table", "fixed"):
        assert scores[name].mean() > scores["random"].mean()
    assert scores["random"].mean() > scores["cheapest"].mean()


def test_lookup_table_without_a_threshold_beats_static_at_every_budget_it_was_fitted_on(
    space: KnobSpace, table: dict[str, np.ndarray], requests: list[PolicyInput]
) -> None:
    generator = np.random.default_rng(5)
    for _ in range(5):
        kept = generator.choice(400, 120, replace=False)
        fitting = (space, table["budgets_ms"], table["accuracy"][kept], table["feasible"][:, kept])
        lookup, static = LookupTable.fit(*fitting, num_errors=0.0), FixedPolicy.fit(*fitting)
        for budget_ms in table["budgets_ms"]:
            mine = [r for r in requests if r.budget_ms == budget_ms and int(r.example_id) in kept]
            lookup_score, static_score = (
                np.mean([table["accuracy"][int(r.example_id), space.index(policy.choose(r))] for r in mine])
                for policy in (lookup, static)
            )
            assert len(mine) == 120
            assert lookup_score >= static_score


def test_oracle_breaks_ties_by_predicted_latency(space: KnobSpace, make_request: Request) -> None:
    accuracy = np.ones(len(space))
    latency_ms = np.arange(len(space), 0, -1, dtype=np.float64)
    policy = OraclePolicy(space, {"a": accuracy}, {"a": latency_ms}, 100.0)
    assert policy.choose(make_request(np.ones(len(space)))) == space.full
    mask = np.ones(len(space))
    mask[-1] = 0
    assert policy.choose(make_request(mask)) == space[len(space) - 2]


def test_a_higher_price_never_makes_the_oracle_slower_and_none_leaves_the_best(
    space: KnobSpace, table: dict[str, np.ndarray], make_request: Request
) -> None:
    generator = np.random.default_rng(1)
    accuracy, latency_ms = generator.uniform(size=len(space)), generator.uniform(20, 90, len(space))
    policy = OraclePolicy(space, {"a": accuracy}, {"a": latency_ms}, 90.0)
    for _ in range(100):
        mask = generator.uniform(size=len(space)) < 0.5
        mask[0] |= not mask.any()
        prices = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
        chosen = [space.index(policy.choose(make_request(mask, price=price))) for price in prices]
        assert mask[chosen].all()
        assert (np.diff(latency_ms[chosen]) <= 0).all()
        assert (np.diff(accuracy[chosen]) <= 0).all()
        assert accuracy[chosen[0]] == accuracy[mask].max()


def test_oracle_refuses_what_it_cannot_know(space: KnobSpace, make_request: Request) -> None:
    accuracy = np.ones(len(space))
    accuracy[3] = np.nan
    policy = OraclePolicy(space, {"a": accuracy}, {"a": np.ones(len(space))}, 100.0)
    with pytest.raises(DataError, match="never run with"):
        policy.choose(make_request(np.ones(len(space))))
    mask = np.ones(len(space))
    mask[3] = 0
    policy.choose(make_request(mask))
    with pytest.raises(DataError, match="no accuracies"):
        policy.choose(make_request(mask, example_id="b"))
    with pytest.raises(DataError, match="shape"):
        OraclePolicy(space, {"a": accuracy[1:]}, {"a": accuracy}, 100.0)
    with pytest.raises(DataError, match="both for every example"):
        OraclePolicy(space, {"a": accuracy}, {}, 100.0)


def test_random_is_uniform_over_the_mask_and_fixed_by_seed_example_and_budget(
    space: KnobSpace, make_request: Request
) -> None:
    mask = np.zeros(len(space))
    mask[[1, 4, 7, 9]] = 1
    asked = [make_request(mask, example_id=str(i)) for i in range(2000)]
    first = [RandomFeasiblePolicy(space, 0).choose(request) for request in asked]
    assert [RandomFeasiblePolicy(space, 0).choose(request) for request in reversed(asked)] == first[::-1]
    assert [RandomFeasiblePolicy(space, 1).choose(request) for request in asked] != first
    other_budget = [make_request(mask, example_id=str(i), budget_ms=51.0) for i in range(2000)]
    assert [RandomFeasiblePolicy(space, 0).choose(request) for request in other_budget] != first
    counts = Counter(space.index(knobs) for knobs in first)
    assert set(counts) == {1, 4, 7, 9}
    # Chi-squared with 3 degrees of freedom: 16.3 is its 99.9 % quantile.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 16.3


def test_masks_of_another_space_are_refused(make_request: Request, policies: dict[str, Policy]) -> None:
    request = make_request(np.ones(12))
    with pytest.raises(KnobError, match="own knob space"):
        RandomFeasiblePolicy(KnobSpace()).choose(request)
