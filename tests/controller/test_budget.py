import math

import pytest
import torch

from pacevlm.controller.budget import BudgetEncoder
from pacevlm.errors import BudgetError, ConfigError

BUDGETS_MS = [10.0, 40.0, 80.0, 84.0, 100.0, 300.0, 2000.0]


@pytest.fixture
def encoder() -> BudgetEncoder:
    torch.manual_seed(0)
    return BudgetEncoder(d_model=32, reference_ms=100.0, embedding_scale=0.03)


def test_a_token_per_budget_as_large_as_an_embedding(encoder: BudgetEncoder) -> None:
    tokens = encoder(BUDGETS_MS)
    assert tokens.shape == (len(BUDGETS_MS), 32)
    rms = tokens.square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.03), rtol=1e-2, atol=0)


def test_only_the_ratio_to_the_reference_counts(encoder: BudgetEncoder) -> None:
    other = BudgetEncoder(d_model=32, reference_ms=400.0, embedding_scale=0.03)
    features = encoder.features([50.0, 120.0])
    torch.testing.assert_close(other.features([200.0, 480.0]), features)
    assert features.shape == (2, encoder.num_features)


def test_budgets_that_differ_by_five_per_cent_have_clearly_different_features(encoder: BudgetEncoder) -> None:
    features = encoder.features(BUDGETS_MS)
    distances = torch.cdist(features, features) + torch.eye(len(BUDGETS_MS)) * 10
    assert distances.min() > 0.5
    assert encoder(BUDGETS_MS).unique(dim=0).shape[0] == len(BUDGETS_MS)


def test_features_depend_on_the_budget_alone_whatever_was_asked_before(encoder: BudgetEncoder) -> None:
    first = {budget_ms: encoder.feature_array(budget_ms).copy() for budget_ms in BUDGETS_MS}
    for budget_ms in (*reversed(BUDGETS_MS), *BUDGETS_MS[::2], *BUDGETS_MS[::2]):
        features = encoder.feature_array(budget_ms)
        assert (features == first[budget_ms]).all()
        with pytest.raises(ValueError, match="read-only"):
            features[0] = 0.0
    encoder.feature_array(1.0)
    with pytest.raises(BudgetError):
        encoder.feature_array(True)


def test_extreme_budgets_stay_within_the_range_of_the_features(encoder: BudgetEncoder) -> None:
    features = encoder.features([1e-300, 1e300])
    assert features.abs().max() <= 4.0
    torch.testing.assert_close(features[:, 0], torch.tensor([-4.0, 4.0]))
    torch.testing.assert_close(features, encoder.features([1e-9, 1e9]))


def test_the_scale_is_learned_and_stays_positive(encoder: BudgetEncoder) -> None:
    before = encoder([80.0]).norm().item()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(encoder([80.0]).square().sum(), encoder.log_scale)
        with torch.no_grad():
            encoder.log_scale -= 50.0 * gradient
    assert 0 < encoder([80.0]).norm().item() < 0.5 * before


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, math.nan, math.inf, True, "80", None])
def test_what_is_no_budget_is_refused(encoder: BudgetEncoder, budget_ms: object) -> None:
    with pytest.raises(BudgetError, match="positive, finite"):
        encoder([80.0, budget_ms])


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
        BudgetEncoder(**{"d_model": 8, "reference_ms": 100.0, "embedding_scale": 1.0, **arguments})
