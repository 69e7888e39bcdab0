"""Actions under a mask; what the mask rules out is never chosen, whatever the logits are."""

from __future__ import annotations

import torch
from torch import Tensor

from pacevlm.errors import DataError, KnobError


def tier_masks(masks: Tensor) -> Tensor:
    """Tiers in which some pair is admitted: `(batch, tiers, top_ks, num_blocks)` gives `(batch, tiers)`, boolean."""
    return masks.flatten(-2).any(dim=-1)


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Put -inf where the mask rules an action out; those logits get no gradient.

    Args:
        logits: `(batch, ...)`.
        mask: boolean, of the same shape; True where an action is allowed.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: a row allows no action.
    """
    _check_mask(logits, mask)
    return logits.masked_fill(~mask, -torch.inf)


def best_action(logits: Tensor, mask: Tensor) -> Tensor:
    """The allowed action with the highest logit, the first of equal ones: `(batch, actions)` gives `(batch,)`.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: a row allows no action.
    """
    _check_mask(logits, mask)
    # An allowed logit of -inf must still win over what the mask rules out.
    scores = logits.clamp(min=torch.finfo(logits.dtype).min)
    return scores.masked_fill(~mask, -torch.inf).argmax(dim=-1)


def _check_mask(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        raise DataError(
            f"the mask is {mask.dtype} {tuple(mask.shape)} and the logits {tuple(logits.shape)}; give a boolean mask "
            "of the same shape, True where an action is allowed"
        )
    blocked = int((~mask.flatten(1).any(dim=1)).sum())
    if blocked:
        raise KnobError(f"{blocked} rows of the mask admit nothing; admit the cheapest knobs where none fit the budget")
