import itertools

import pytest
import torch

from pacevlm.controller.sampling import best_action, mask_logits, pair_masks, sample_pairs, sample_tiers, tier_masks
from pacevlm.errors import DataError, KnobError

HOSTILE = [0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]


def all_masks(num_actions: int) -> torch.Tensor:
    """Every mask that admits something, `(2 ** actions - 1, actions)`."""
    return torch.tensor([m for m in itertools.product([False, True], repeat=num_actions) if any(m)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", HOSTILE)
def test_no_masked_action_whatever_the_logits(fill: float) -> None:
    masks = all_masks(8)
    rows = torch.arange(len(masks))
    preferring_masked = torch.where(masks, fill, 1e30)
    random = torch.randn(masks.shape, generator=generator())
    random[torch.rand(masks.shape, generator=generator()) < 0.3] = fill
    for logits in (preferring_masked, random):
        assert masks[rows, best_action(logits, masks)].all()
        for seed in range(20):
            pairs = sample_pairs(logits.view(-1, 2, 4), masks.view(-1, 2, 4), generator(seed))
            assert masks[rows, pairs].all()


@pytest.mark.parametrize("fill", HOSTILE)
def test_no_tier_without_an_admitted_pair(fill: float) -> None:
    masks = all_masks(9).view(-1, 3, 1, 3)
    logits = torch.full((len(masks), 3), fill)
    tiers = sample_tiers(logits, masks, 16, generator())
    assert tiers.shape == (len(masks), 16)
    assert masks.any(dim=(2, 3)).gather(1, tiers).all()


def test_masks_of_tiers_and_pairs() -> None:
    masks = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    masks[0, 1, 0, 1] = masks[1, 0, 1, 1] = masks[1, 2] = True
    assert tier_masks(masks).tolist() == [[False, True, False], [True, False, True]]
    tiers = torch.tensor([[1, 1], [2, 0]])
    pairs = pair_masks(masks, tiers)
    for row, sample in itertools.product(range(2), range(2)):
        assert torch.equal(pairs[row, sample], masks[row, tiers[row, sample]])


def test_draws_follow_the_masked_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, 3.0, -1.0, 0.5, 0.2]]).view(1, 2, 3)
    mask = torch.tensor([[True, True, False, True, False, True]]).view(1, 2, 3)
    num = 20_000
    expected = mask_logits(logits, mask).flatten().softmax(0)
    pairs = sample_pairs(logits.expand(num, 2, 3), mask.expand(num, 2, 3), generator())
    torch.testing.assert_close(pairs.bincount(minlength=6) / num, expected, atol=0.015, rtol=0)

    tier_logits = torch.tensor([[0.0, 5.0, 1.0]])
    masks = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    masks[0, 1] = False
    tiers = sample_tiers(tier_logits, masks, num, generator())
    expected = torch.tensor([1.0, 0.0, torch.e]) / (1 + torch.e)
    torch.testing.assert_close(tiers[0].bincount(minlength=3) / num, expected, atol=0.015, rtol=0)


def test_a_generator_fixes_the_draw() -> None:
    logits, masks = torch.randn(4, 3, generator=generator()), torch.ones(4, 3, 2, 2, dtype=torch.bool)
    first, again, other = (sample_tiers(logits, masks, 32, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_action_is_the_first_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert best_action(logits, mask).tolist() == [1, 1]


def test_masked_logits_get_no_gradient() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    masked = mask_logits(logits, mask)
    assert torch.equal(torch.isneginf(masked), ~mask)
    masked.logsumexp(dim=1).sum().backward()
    assert torch.equal(logits.grad == 0, ~mask)


@pytest.mark.parametrize("draw", [mask_logits, best_action, sample_pairs])
def test_masks_that_fit_nothing_are_refused(draw: object) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(KnobError, match="1 rows of the mask admit nothing"):
        draw(logits, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(DataError, match="boolean mask"):
        draw(logits, torch.ones(2, 3))
    with pytest.raises(DataError, match="same shape"):
        draw(logits, torch.ones(2, 4, dtype=torch.bool))


def test_tier_masks_that_fit_nothing_are_refused() -> None:
    with pytest.raises(KnobError, match="1 rows"):
        sample_tiers(torch.zeros(1, 3), torch.zeros(1, 3, 2, 2, dtype=torch.bool), 4)
    with pytest.raises(DataError, match="same shape"):
        sample_tiers(torch.zeros(1, 3), torch.ones(1, 2, 2, 2, dtype=torch.bool), 4)
