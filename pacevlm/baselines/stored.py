"""Writing fitted baselines as JSON and reading them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pacevlm.artefact import load_artefact, save_artefact, typed
from pacevlm.baselines.ranking import IntArray
from pacevlm.errors import CheckpointError, DataError
from pacevlm.identity import Identity
from pacevlm.knobs import KnobSpace

SCHEMA_VERSION = 4


def save_fitted(path: str | Path, kind: str, space: KnobSpace, content: Mapping[str, Any]) -> None:
    """Write a fitted policy with the knob space it was fitted for; raises StorageError."""
    save_artefact(path, kind, SCHEMA_VERSION, {"knob_space": space.to_dict(), **content}, CheckpointError)


def load_fitted(path: str | Path, kind: str, space: KnobSpace, content: Any) -> dict[str, Any]:
    """Read what `save_fitted` wrote.

    Args:
        content: the TypedDict that the content is.

    Raises:
        CheckpointError: the file is missing, damaged, malformed, or of another kind or version.
        IdentityError: it was fitted for another knob space.
    """
    values = load_artefact(path, kind, SCHEMA_VERSION, CheckpointError)
    stored_space = typed(KnobSpace, values.pop("knob_space", None), f"the knob space of {path}", CheckpointError)
    Identity(knob_space=stored_space).check(f"the {kind} {path}", Identity(knob_space=space))
    stored: dict[str, Any] = typed(content, values, f"the {kind} {path}", CheckpointError)
    return stored


def check_order(order: Sequence[int] | IntArray, space: KnobSpace) -> IntArray:
    """Return a preference order as an array; raises DataError unless it is a permutation of the space's indices."""
    indices = np.asarray(order, dtype=np.int64)
    if indices.shape != (len(space),) or not np.array_equal(np.sort(indices), np.arange(len(space))):
        raise DataError(f"an order must name each of the {len(space)} configurations once, got {indices.tolist()}")
    return indices
