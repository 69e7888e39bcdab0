"""Actions under a mask; what the mask rules out is never chosen, whatever the logits are."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacevlm.errors import DataError, KnobError


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Put -inf where the mask rules an action out; those logits get no gradient.

    Args:
        logits: `(batch, ...)`.
        mask: boolean, of the same shape, on any device; True where an action is allowed.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: a row allows no action.
    """
    _check_mask(logits, mask)
    return logits.masked_fill(~mask.to(logits.device), -torch.inf)


def best_action(logits: NDArray[np.float32], mask: NDArray[np.bool_]) -> int:
    """The allowed action with the highest logit, the first of equal ones, of one request `(actions,)`.

    On arrays: torch takes longer to be called than to compare.

    Raises:
        DataError: the mask is not boolean or has another shape.
        KnobError: no action is allowed.
    """
    if mask.dtype != np.bool_ or mask.shape != logits.shape:
        _refuse_mask(mask, logits)
    best = int(np.where(mask, logits, -np.inf).argmax())
    if mask[best]:
        return best
    # Nothing is allowed, or nothing but logits of -inf, which still win over what the mask rules out.
    if not mask.any():
        _refuse_rows(1)
    return int(mask.argmax())


def _check_mask(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        _refuse_mask(mask, logits)
    blocked = int((~mask.flatten(1).any(dim=1)).sum())
    if blocked:
        _refuse_rows(blocked)


def _refuse_mask(mask: Tensor | NDArray[Any], logits: Tensor | NDArray[Any]) -> NoReturn:
    raise DataError(
        f"the mask is {mask.dtype} {tuple(mask.shape)} and the logits {tuple(logits.shape)}; give a boolean mask "
        "of the same shape, True where an action is allowed"
    )


def _refuse_rows(blocked: int) -> NoReturn:
    raise KnobError(f"{blocked} rows of the mask admit nothing; admit the cheapest knobs where none fit the budget")
