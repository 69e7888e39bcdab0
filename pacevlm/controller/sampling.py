"""Drawing actions under a mask; what the mask rules out is never drawn, whatever the logits are."""

from __future__ import annotations

import torch
from torch import Tensor

from pacevlm.errors import DataError, KnobError


def tier_masks(masks: Tensor) -> Tensor:
    """Tiers in which some pair is admitted: `(batch, tiers, top_ks, num_blocks)` gives `(batch, tiers)`, boolean."""
    return masks.flatten(-2).any(dim=-1)


def pair_masks(masks: Tensor, tiers: Tensor) -> Tensor:
    """Admitted pairs of the tiers that stage 1 chose.

    Args:
        masks: boolean `(batch, tiers, top_ks, num_blocks)`.
        tiers: tier indices `(batch, samples)`.

    Returns:
        `(batch, samples, top_ks, num_blocks)`.
    """
    rows = torch.arange(len(masks), device=masks.device)[:, None]
    return masks[rows, tiers]


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


def sample_tiers(logits: Tensor, masks: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw tiers in which the mask admits at least one pair, in proportion to exp(logits).

    Args:
        logits: `(batch, tiers)`.
        masks: boolean `(batch, tiers, top_ks, num_blocks)`.
        num_samples: independent draws per row.

    Returns:
        Tier indices `(batch, num_samples)`.

    Raises:
        DataError: the mask is not boolean, or the shapes do not fit.
        KnobError: a row admits nothing.
    """
    mask = tier_masks(masks)
    _check_mask(logits, mask)
    shape = (len(logits), num_samples, logits.shape[-1])
    return _draw(logits[:, None].expand(shape), mask[:, None].expand(shape), generator)


def sample_pairs(logits: Tensor, masks: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one admitted pair per row, in proportion to exp(logits).

    Args:
        logits: `(batch, top_ks, num_blocks)`.
        masks: boolean, of the same shape: each row's own tier.

    Returns:
        Stage-2 indices `(batch,)`, as `KnobSpace.pair` takes them.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: a row admits nothing.
    """
    _check_mask(logits, masks)
    return _draw(logits.flatten(1), masks.flatten(1), generator)


def best_action(logits: Tensor, mask: Tensor) -> Tensor:
    """The allowed action with the highest logit, the first of equal ones: `(batch, actions)` gives `(batch,)`.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: a row allows no action.
    """
    _check_mask(logits, mask)
    return _masked_argmax(logits, mask)


def _draw(logits: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel-max over the last axis; a table of probabilities is never formed, so none can be rounded above 0."""
    noise = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).exponential_(generator=generator)
    return _masked_argmax(logits - noise.clamp(min=torch.finfo(logits.dtype).tiny).log(), mask)


def _masked_argmax(scores: Tensor, mask: Tensor) -> Tensor:
    # An allowed score of -inf must still win over what the mask rules out.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
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
