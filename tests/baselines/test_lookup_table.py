import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import CheckpointError, DataError, IdentityError
from pacevlm.knobs import KnobSpace

Request = Callable[..., PolicyInput]


@pytest.fixture(scope="module")
def fitted(space: KnobSpace, table: dict[str, np.ndarray]) -> LookupTable:
    return LookupTable.fit(space, table["budgets_ms"], table["accuracy"], table["feasible"])


def test_the_first_feasible_of_the_order_runs(space: KnobSpace, fitted: LookupTable, make_request: Request) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = generator.uniform(size=len(space)) < 0.3
        request = make_request(mask, budget_ms=45.0)
        chosen = space.index(fitted.choose(request))
        admitted = request.feasible.reshape(-1)
        rank = {int(index): position for position, index in enumerate(fitted.order_for(45.0))}
        assert admitted[chosen]
        assert all(rank[chosen] <= rank[int(other)] for other in np.flatnonzero(admitted))


def test_plain_ranking_runs_the_best_mean_where_all_is_feasible(
    space: KnobSpace, table: dict[str, np.ndarray], make_request: Request
) -> None:
    for num_errors in (None, 2.0):
        everything = np.ones_like(table["feasible"])
        policy = LookupTable.fit(space, table["budgets_ms"], table["accuracy"], everything, num_errors=num_errors)
        best = space[int(table["accuracy"].mean(axis=0).argmax())]
        assert policy.choose(make_request(np.ones(len(space)))) == best


def test_fitting_is_at_least_as_good_on_its_data_as_the_plain_ranking(
    space: KnobSpace, table: dict[str, np.ndarray], make_request: Request
) -> None:
    served = {}
    for num_errors in (None, 0.0, 2.0):
        policy = LookupTable.fit(
            space, table["budgets_ms"], table["accuracy"], table["feasible"], num_errors=num_errors
        )
        served[num_errors] = np.mean(
            [
                table["accuracy"][i, space.index(policy.choose(make_request(mask[i], budget_ms=float(budget_ms))))]
                for budget_ms, mask in zip(table["budgets_ms"], table["feasible"], strict=True)
                for i in range(len(mask))
            ]
        )
    assert served[None] <= served[2.0]
    assert served[None] <= served[0.0]


def test_budgets_between_fitted_ones_use_the_lower_and_below_all_the_lowest(space: KnobSpace) -> None:
    forward, backward = list(range(len(space))), list(range(len(space)))[::-1]
    policy = LookupTable(space, {60.0: backward, 30: forward})
    for budget_ms, order in ((10.0, forward), (30.0, forward), (59.9, forward), (60.0, backward), (500.0, backward)):
        assert policy.order_for(budget_ms).tolist() == order


def test_saved_and_loaded_tables_are_equal(space: KnobSpace, fitted: LookupTable, tmp_path: Path) -> None:
    fitted.save(tmp_path / "table.json")
    loaded = LookupTable.load(tmp_path / "table.json", space)
    assert loaded.budgets_ms == fitted.budgets_ms
    np.testing.assert_array_equal(loaded.orders, fitted.orders)


def test_files_of_another_space_or_form_are_refused(
    space: KnobSpace, fitted: LookupTable, tmp_path: Path, reseal: Callable
) -> None:
    path = tmp_path / "table.json"
    fitted.save(path)
    with pytest.raises(IdentityError, match="another knob space"):
        LookupTable.load(path, KnobSpace())
    content = json.loads(path.read_text())
    for broken in (
        {**content, "budgets": [{"budget_ms": 1.0}]},
        {**content, "budgets": []},
        {**content, "budgets": [{"budget_ms": 1.0, "order": ["low/4/12"] * len(space)}]},
        {**content, "budgets": [{"budget_ms": -1.0, "order": []}]},
        {**content, "kind": "another"},
        {**content, "schema_version": 99},
    ):
        reseal(path, broken)
        with pytest.raises(CheckpointError, match=r"table\.json"):
            LookupTable.load(path, space)
    with pytest.raises(CheckpointError, match="there is no"):
        LookupTable.load(tmp_path / "absent.json", space)


def test_orders_must_be_permutations(space: KnobSpace) -> None:
    with pytest.raises(DataError, match="each of the"):
        LookupTable(space, {30.0: [0] * len(space)})
    with pytest.raises(DataError, match="at least one budget"):
        LookupTable(space, {})
