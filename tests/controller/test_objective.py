import math

import pytest
import torch

from pacevlm.controller.objective import ObjectiveEncoder
from pacevlm.errors import BudgetError, ConfigError
from pacevlm.knobs import MAX_PRICE
from pacevlm.types import Objective

BUDGETS_MS = [10.0, 40.0, 80.0, 84.0, 100.0, 300.0, 2000.0]
PRICES = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, MAX_PRICE]


def budgets(*budgets_ms: float) -> list[Objective]:
    return [Objective(budget_ms) for budget_ms in budgets_ms]


@pytest.fixture
def encoder() -> ObjectiveEncoder:
    torch.manual_seed(0)
    return ObjectiveEncoder(d_model=32, reference_ms=100.0, embedding_scale=0.03)


def test_a_token_per_budget_as_large_as_an_embedding(encoder: ObjectiveEncoder) -> None:
    tokens = encoder(budgets(*BUDGETS_MS))
    assert tokens.shape == (len(BUDGETS_MS), 32)
    rms = tokens.square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.03), rtol=1e-2, atol=0)


def test_only_the_ratio_to_the_reference_counts(encoder: ObjectiveEncoder) -> None:
    other = ObjectiveEncoder(d_model=32, reference_ms=400.0, embedding_scale=0.03)
    features = encoder.features(budgets(50.0, 120.0))
    torch.testing.assert_close(other.features(budgets(200.0, 480.0)), features)
    assert features.shape == (2, encoder.num_features)


def test_budgets_that_differ_by_five_per_cent_have_clearly_different_features(encoder: ObjectiveEncoder) -> None:
    features = encoder.features(budgets(*BUDGETS_MS))
    distances = torch.cdist(features, features) + torch.eye(len(BUDGETS_MS)) * 10
    assert distances.min() > 0.5
    assert encoder(budgets(*BUDGETS_MS)).unique(dim=0).shape[0] == len(BUDGETS_MS)


def test_features_depend_on_the_objective_alone_whatever_was_asked_before(encoder: ObjectiveEncoder) -> None:
    objectives = [Objective(budget_ms, price=price) for budget_ms in BUDGETS_MS for price in (0.0, 5.0)]
    first = {objective: encoder.feature_array(objective).copy() for objective in objectives}
    for objective in (*reversed(objectives), *objectives[::2], *objectives[::2]):
        features = encoder.feature_array(objective)
        assert (features == first[objective]).all()
        with pytest.raises(ValueError, match="read-only"):
            features[0] = 0.0


def test_a_price_moves_features_of_its_own_which_rise_with_it_and_are_bounded(encoder: ObjectiveEncoder) -> None:
    features = encoder.features([Objective(80.0, price=price) for price in PRICES])
    moved = (features != features[0]).any(dim=0)
    assert torch.equal(features[:, ~moved], encoder.features(budgets(80.0))[:, ~moved].expand(len(PRICES), -1))
    prices = features[:, moved]
    assert (prices[0] == 0).all()
    assert (prices.diff(dim=0) > 0).all()
    assert prices.max() < 1
    # Prices a factor of 2 apart are clearly different over the range that is trained.
    assert prices[1:8].diff(dim=0).norm(dim=1).min() > 0.15
    assert encoder([Objective(80.0, price=price) for price in PRICES]).unique(dim=0).shape[0] == len(PRICES)


def test_extreme_budgets_stay_within_the_range_of_the_features(encoder: ObjectiveEncoder) -> None:
    features = encoder.features(budgets(1e-300, 1e300))
    assert features.abs().max() <= 4.0
    torch.testing.assert_close(features[:, 0], torch.tensor([-4.0, 4.0]))
    torch.testing.assert_close(features, encoder.features(budgets(1e-9, 1e9)))


def test_the_scale_is_learned_and_stays_positive(encoder: ObjectiveEncoder) -> None:
    before = encoder(budgets(80.0)).norm().item()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(encoder(budgets(80.0)).square().sum(), encoder.log_scale)
        with torch.no_grad():
            encoder.log_scale -= 50.0 * gradient
    assert 0 < encoder(budgets(80.0)).norm().item() < 0.5 * before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"reference_ms": 0.0}, BudgetError),
        ({"embedding_scale": 0.0}, ConfigError),
        ({"embedding_scale": math.nan}, ConfigError),
        ({"d_model": 0}, ConfigError),
        ({"num_frequencies": 0}, ConfigError),
        ({"hidden_dim": 0}, ConfigError),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], error: type[Exception]) -> None:
    with pytest.raises(error):
        ObjectiveEncoder(**{"d_model": 8, "reference_ms": 100.0, "embedding_scale": 1.0, **arguments})
