import itertools
from collections.abc import Callable

import pytest
import torch

from pacevlm.controller.sampling import best_action, mask_logits
from pacevlm.errors import DataError, KnobError

HOSTILE = [0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]


def all_masks(num_actions: int) -> torch.Tensor:
    """Every mask that admits something, `(2 ** actions - 1, actions)`."""
    return torch.tensor([m for m in itertools.product([False, True], repeat=num_actions) if any(m)])


@pytest.mark.parametrize("fill", HOSTILE)
def test_no_masked_action_whatever_the_logits(fill: float) -> None:
    masks = all_masks(8)
    preferring_masked = torch.where(masks, fill, 1e30)
    random = torch.randn(masks.shape, generator=torch.Generator().manual_seed(0))
    random[torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = fill
    for logits in (preferring_masked, random):
        assert all(mask[best_action(row, mask)] for row, mask in zip(logits.numpy(), masks.numpy(), strict=True))


def test_the_best_action_is_the_first_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert [best_action(*row) for row in zip(logits.numpy(), mask.numpy(), strict=True)] == [1, 1]


def test_an_allowed_logit_that_is_not_finite_beats_what_is_masked() -> None:
    for fill in (-torch.inf, -1e30):
        logits = torch.tensor([9.0, fill, fill])
        assert best_action(logits.numpy(), torch.tensor([False, True, True]).numpy()) == 1


def test_masked_logits_get_no_gradient() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    masked = mask_logits(logits, mask)
    assert torch.equal(torch.isneginf(masked), ~mask)
    masked.logsumexp(dim=1).sum().backward()
    assert torch.equal(logits.grad == 0, ~mask)


def best_of_tensors(logits: torch.Tensor, mask: torch.Tensor) -> object:
    return [best_action(*row) for row in zip(logits.numpy(), mask.numpy(), strict=True)]


@pytest.mark.parametrize("draw", [mask_logits, best_of_tensors])
def test_masks_that_fit_nothing_are_refused(draw: Callable[..., object]) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(KnobError, match="1 rows of the mask admit nothing"):
        draw(logits, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(DataError, match="boolean mask"):
        draw(logits, torch.ones(2, 3))
    with pytest.raises(DataError, match="same shape"):
        draw(logits, torch.ones(2, 4, dtype=torch.bool))
