import numpy as np
import pytest

from pacevlm.baselines.ranking import check_table, fill_missing, promote_better, rank_by_mean, served_accuracy
from pacevlm.errors import DataError
from pacevlm.knobs import KnobSpace


def test_a_complete_table_is_not_changed(table: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(fill_missing(table["accuracy"]), table["accuracy"])


def test_missing_entries_of_an_additive_table_are_recovered() -> None:
    generator = np.random.default_rng(0)
    example, configuration = generator.uniform(0.1, 0.5, (60, 1)), generator.uniform(0.0, 0.4, 8)
    truth = example + configuration
    # The better a configuration, the fewer (and easier) examples ran it: a mean over what ran would mislead.
    hidden = (example < 0.3) & (np.arange(8) >= 4) & (generator.uniform(size=truth.shape) < 0.8)
    np.testing.assert_allclose(fill_missing(np.where(hidden, np.nan, truth)), truth, atol=1e-10)
    assert hidden.any()


def test_filling_removes_the_bias_of_unequal_examples() -> None:
    # Configuration 0 is better on every example, but ran only on the hard ones.
    accuracy = np.array([[np.nan, 0.8]] * 5 + [[0.4, 0.2]] * 5)
    assert np.nanmean(accuracy, axis=0).argmax() == 1
    assert rank_by_mean(fill_missing(accuracy))[0] == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_or_columns_that_never_ran_are_refused(axis: int) -> None:
    accuracy = np.full((4, 3), 0.5)
    accuracy[(slice(None), 1) if axis == 0 else (1, slice(None))] = np.nan
    with pytest.raises(DataError, match="never ran"):
        fill_missing(accuracy)


def test_ties_go_to_the_cheaper_index() -> None:
    assert rank_by_mean(np.array([[0.5, 1.0, 0.5, 1.0]])).tolist() == [1, 3, 0, 2]


def test_promotion_never_serves_worse_and_helps_where_the_mean_misleads() -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        accuracy = generator.uniform(size=(50, 6)).round()
        feasible = generator.uniform(size=(50, 6)) < 0.5
        feasible[:, 0] = True
        order = rank_by_mean(accuracy)
        promoted = promote_better(accuracy, feasible, order, 0.0)
        assert sorted(promoted) == list(range(6))
        value = served_accuracy(accuracy, feasible, promoted).mean()
        assert value >= served_accuracy(accuracy, feasible, order).mean()
        # Without a threshold no single move to the front is left that helps.
        for index in range(6):
            other = np.concatenate([[index], promoted[promoted != index]])
            assert served_accuracy(accuracy, feasible, other).mean() <= value + 1e-12
    # Configuration 1 has the higher mean only thanks to examples on which this budget never admits it.
    accuracy = np.array([[0.6, 1.0]] * 70 + [[0.6, 0.1]] * 30)
    feasible = np.array([[True, False]] * 70 + [[True, True]] * 30)
    assert rank_by_mean(accuracy)[0] == 1
    assert promote_better(accuracy, feasible, rank_by_mean(accuracy), 1.0)[0] == 0


def test_where_everything_is_feasible_the_ranking_stays(table: dict[str, np.ndarray]) -> None:
    order = rank_by_mean(table["accuracy"])
    everything = np.ones_like(table["accuracy"], dtype=bool)
    np.testing.assert_array_equal(promote_better(table["accuracy"], everything, order, 0.0), order)


def test_tables_of_the_wrong_form_are_refused(space: KnobSpace, table: dict[str, np.ndarray]) -> None:
    accuracy, feasible, budgets_ms = table["accuracy"], table["feasible"], table["budgets_ms"]
    with pytest.raises(DataError, match="shape"):
        check_table(space, budgets_ms, accuracy[:, 1:], feasible)
    with pytest.raises(DataError, match="shape"):
        check_table(space, budgets_ms[1:], accuracy, feasible)
    with pytest.raises(DataError, match="increasing"):
        check_table(space, budgets_ms[::-1], accuracy, feasible)
    nothing = np.zeros_like(feasible)
    assert check_table(space, budgets_ms, accuracy, nothing)[1].sum() == nothing[..., 0].size
    assert not nothing.any()
