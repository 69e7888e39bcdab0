"""Reading fitted baselines back from JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pacevlm.baselines.ranking import IntArray
from pacevlm.errors import CheckpointError, DataError, IdentityError
from pacevlm.files import read_json
from pacevlm.knobs import KnobSpace

VERSION = 1


@dataclass(frozen=True)
class StoredPolicy:
    """The JSON object of a fitted policy, with the path it came from for error messages."""

    path: Path
    values: dict[str, Any]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn whatever goes wrong while the object is taken apart into a CheckpointError that names the file."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is malformed ({error!r}); fit the policy again") from error


def space_entry(space: KnobSpace) -> dict[str, Any]:
    """The keys that identify a fitted policy's file."""
    return {"version": VERSION, "space": space.to_dict()}


def read_fitted(path: str | Path, kind: str, space: KnobSpace) -> StoredPolicy:
    """Read the JSON object of a fitted policy and check what it was made for.

    Raises:
        CheckpointError: the file is missing, not JSON, or of another kind or version.
        IdentityError: it was fitted for another knob space.
    """
    source = Path(path)
    values = read_json(source, "fitted policy", CheckpointError)
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (kind, VERSION):
        raise CheckpointError(
            f"{source} holds {found}, not {(kind, VERSION)}; give the file that save wrote, or fit again"
        )
    stored = StoredPolicy(source, values)
    with stored.guarded():
        stored_space = KnobSpace.from_dict(values["space"])
    if stored_space != space:
        raise IdentityError(
            f"{source} was fitted for the knob space {stored_space.to_dict()}, not {space.to_dict()}; "
            "use that space or fit again"
        )
    return stored


def check_order(order: Sequence[int] | IntArray, space: KnobSpace) -> IntArray:
    """Return a preference order as an array; raises DataError unless it is a permutation of the space's indices."""
    indices = np.asarray(order, dtype=np.int64)
    if indices.shape != (len(space),) or not np.array_equal(np.sort(indices), np.arange(len(space))):
        raise DataError(f"an order must name each of the {len(space)} configurations once, got {indices.tolist()}")
    return indices
