import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.ranking import promote_better, rank_by_mean
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
    policy = LookupTable(space, [30, 60.0], [[[forward]], [[backward]]])
    for budget_ms, order in ((10.0, forward), (30.0, forward), (59.9, forward), (60.0, backward), (500.0, backward)):
        assert policy.order_for(budget_ms).tolist() == order


def test_prices_between_fitted_ones_use_the_lower_and_sizes_their_own(space: KnobSpace) -> None:
    orders = np.stack([np.roll(np.arange(len(space)), shift) for shift in range(6)]).reshape(1, 3, 2, -1)
    policy = LookupTable(space, [30.0], orders, prices=(0, 2.0, 8.0), max_pixels=(1000,))
    for price, place in ((0.0, 0), (1.99, 0), (2.0, 1), (7.9, 1), (8.0, 2), (1000.0, 2)):
        for num_pixels, size in ((1, 0), (1000, 0), (1001, 1), (10**9, 1)):
            assert policy.order_for(30.0, price, num_pixels).tolist() == orders[0, place, size].tolist()


PRICES = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0)


@pytest.fixture(scope="module")
def priced(space: KnobSpace, table: dict[str, np.ndarray]) -> LookupTable:
    """At prices and sizes of pictures; latencies keep their order whatever the example."""
    latency = table["latency_ms"] / table["latency_ms"][:, -1].mean()
    num_pixels = np.arange(len(latency)) ** 2 + 1
    fitting = (space, table["budgets_ms"], table["accuracy"], table["feasible"])
    return LookupTable.fit(*fitting, num_errors=0.0, prices=PRICES, latency=latency, num_pixels=num_pixels)


def test_a_higher_price_never_chooses_slower_knobs_whatever_the_mask(
    space: KnobSpace, table: dict[str, np.ndarray], priced: LookupTable, make_request: Request
) -> None:
    generator, saved = np.random.default_rng(0), 0
    for example in range(200):
        mask, latency_ms = generator.uniform(size=len(space)) < generator.uniform(), table["latency_ms"][example]
        for budget_ms in (20.0, 30.0, 50.0, 100.0):
            chosen = [
                space.index(priced.choose(make_request(mask, budget_ms=budget_ms, price=price, num_pixels=example**2)))
                for price in (*PRICES, 1000.0)
            ]
            assert all(mask[chosen]) or not mask.any()
            assert (np.diff(latency_ms[chosen]) <= 0).all()
            saved += latency_ms[chosen[0]] > latency_ms[chosen[-1]]
    assert saved > 100


def test_no_price_alone_and_no_sizes_are_the_table_of_budgets_alone(
    space: KnobSpace, table: dict[str, np.ndarray], fitted: LookupTable
) -> None:
    fitting = (space, table["budgets_ms"], table["accuracy"], table["feasible"])
    ranking = rank_by_mean(table["accuracy"])
    for place, mask in enumerate(table["feasible"]):
        expected = promote_better(table["accuracy"], mask, ranking, 2.0)
        assert fitted.orders[place, 0, 0].tolist() == expected.tolist()
    priced = LookupTable.fit(*fitting, prices=PRICES, latency=table["latency_ms"])
    assert np.array_equal(priced.orders[:, :1], fitted.orders)
    one_size = LookupTable.fit(*fitting, num_pixels=np.full(len(table["accuracy"]), 500))
    for num_pixels in (1, 500, 10**6):  # thirds that hold nothing share the ranking of all
        assert one_size.order_for(45.0, 0.0, num_pixels).tolist() == fitted.order_for(45.0).tolist()


def test_each_third_of_the_sizes_has_its_own_ranking_unless_it_is_small(space: KnobSpace) -> None:
    accuracy = np.zeros((300, len(space)))
    for third, best in enumerate((3, 7, 5)):
        accuracy[100 * third : 100 * third + 100, best] = 1.0
    accuracy[:, 0] = 0.5
    num_pixels = np.repeat([100, 200, 300], 100)
    for step, best in ((1, (3, 7, 5)), (5, (0, 0, 0))):  # every example, and 20 of each size
        rows = slice(None, None, step)
        feasible = np.ones((1, len(accuracy[rows]), len(space)), dtype=bool)
        policy = LookupTable.fit(space, [50.0], accuracy[rows], feasible, num_pixels=num_pixels[rows])
        assert policy.max_pixels == (100, 200)
        assert tuple(policy.order_for(50.0, num_pixels=pixels)[0] for pixels in (99, 101, 10**9)) == best


def test_saved_and_loaded_tables_are_equal(
    space: KnobSpace, fitted: LookupTable, priced: LookupTable, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "table.json")
    loaded = LookupTable.load(tmp_path / "table.json", space)
    assert loaded.budgets_ms == fitted.budgets_ms
    np.testing.assert_array_equal(loaded.orders, fitted.orders)
    priced.save(tmp_path / "table.json")
    loaded = LookupTable.load(tmp_path / "table.json", space)
    assert (loaded.prices, loaded.max_pixels) == (priced.prices, priced.max_pixels)
    np.testing.assert_array_equal(loaded.orders, priced.orders)


def test_files_of_another_space_or_form_are_refused(
    space: KnobSpace, fitted: LookupTable, tmp_path: Path, reseal: Callable
) -> None:
    path = tmp_path / "table.json"
    fitted.save(path)
    with pytest.raises(IdentityError, match="another knob space"):
        LookupTable.load(path, KnobSpace())
    content = json.loads(path.read_text())
    for broken in (
        {**content, "budgets_ms": []},
        {**content, "budgets_ms": content["budgets_ms"][::-1]},
        {**content, "prices": [1.0]},
        {**content, "prices": [0.0, 2.0]},
        {**content, "max_pixels": [5]},
        {**content, "orders": []},
        {**content, "orders": [["low/4/12"] * len(space)] * len(content["orders"])},
        {**content, "places": [[[0]]]},
        {**content, "places": [[[0]], [[0, 0]], [[0]]]},
        {**content, "places": [[[0]], [[10**6]], [[0]]]},
        {**content, "places": [[[0]], [[-1]], [[0]]]},
        {"budgets": [{"budget_ms": 1.0, "order": []}], "knob_space": content["knob_space"]},
        {**content, "kind": "another"},
        {**content, "schema_version": 99},
    ):
        reseal(path, broken)
        with pytest.raises(CheckpointError, match=r"table\.json"):
            LookupTable.load(path, space)
    with pytest.raises(CheckpointError, match="there is no"):
        LookupTable.load(tmp_path / "absent.json", space)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": [[[[0] * 12]]]}, "each of the"),
        ({"budgets_ms": [], "orders": np.zeros((0, 1, 1, 12))}, "increasing budgets"),
        ({"budgets_ms": [30.0, 30.0]}, "increasing budgets"),
        ({"prices": (1.0,)}, "from 0"),
        ({"prices": ()}, "from 0"),
        ({"max_pixels": (5, 4)}, "increasing sizes"),
        ({"max_pixels": (5,)}, "have shape"),
    ],
)
def test_what_is_no_table_is_refused(space: KnobSpace, changes: dict[str, object], message: str) -> None:
    arguments = {"budgets_ms": [30.0], "orders": [[[list(range(len(space)))]]], **changes}
    with pytest.raises(DataError, match=message):
        LookupTable(space, **arguments)


def test_prices_need_latencies_of_all_examples(space: KnobSpace, table: dict[str, np.ndarray]) -> None:
    fitting = (space, table["budgets_ms"], table["accuracy"], table["feasible"])
    with pytest.raises(DataError, match="need the predicted latency"):
        LookupTable.fit(*fitting, prices=(0.0, 1.0))
    with pytest.raises(DataError, match="latency has shape"):
        LookupTable.fit(*fitting, prices=(0.0, 1.0), latency=table["latency_ms"][:5])
    with pytest.raises(DataError, match="num_pixels"):
        LookupTable.fit(*fitting, num_pixels=[5, 6])
