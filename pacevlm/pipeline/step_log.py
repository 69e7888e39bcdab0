"""`steps.json`: which steps of a run are finished, with which settings, and what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, get_args

from pacevlm.artefact import Count, Duration, Ms, Share, Text, load_artefact, save_artefact, typed
from pacevlm.config import changed_settings
from pacevlm.errors import CheckpointError
from pacevlm.types import BudgetKind

STEP_LOG_NAME = "steps.json"
KIND = "list of finished steps"
SCHEMA_VERSION = 2


class _Entry(TypedDict):
    """What the file holds of each step."""

    finished_at: Text
    seconds: Duration
    settings: dict[str, Any]
    facts: dict[str, Any]


class _Interval(TypedDict):
    mean: float
    low: float
    high: float


_MsByKind = TypedDict("_MsByKind", dict.fromkeys(get_args(BudgetKind), Ms))  # type: ignore[misc]

# The facts that are read again, by a later step or to be printed; others are for people.
_FACTS: dict[str, dict[str, Any]] = {
    "profile": {
        "full_p50_ms": _MsByKind,
        "num_samples": Count,
        "coverage": Share | None,
        "noise_cv": Duration,
        "num_noisy_windows": Count,
        "ape_p50": Duration,
    },
    "lookup": {"num_examples": Count, "accuracy_full": Share, "accuracy_cheapest": Share},
    "train": {"num_steps": Count, "reward": float, "entropy": float},
    "calibrate": {"num_requests": Count, "factors": dict[Text, Ms], "default_price": Duration},
    "evaluate": {
        "num_examples": Count,
        "num_timed_requests": Count,
        "num_disagreements": Count,
        "controller_vs_lookup_table": _Interval | None,
        "gap_closed": _Interval | None,
    },
}


@dataclass(frozen=True)
class FinishedStep:
    """A step that ran to its end.

    Attributes:
        settings: all that its outcome depends on.
        seconds: wall-clock time it took.
        facts: numbers that later steps or readers want, ready for JSON.
    """

    settings: dict[str, Any]
    seconds: float
    facts: dict[str, Any]

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """What differs from other settings, each as `name was …, now …`."""
        # Through JSON, as the stored ones went: tuples become lists.
        return changed_settings(self.settings, json.loads(json.dumps(dict(settings))))


class StepLog:
    """The finished steps of a run directory.

    Args:
        run_dir: the run's folder.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STEP_LOG_NAME
        self._steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            values = load_artefact(self.path, KIND, SCHEMA_VERSION, CheckpointError)
            self._steps = typed(dict[Text, _Entry], values, str(self.path), CheckpointError)
            for name, entry in self._steps.items():
                for fact, hint in _FACTS.get(name, {}).items():
                    if fact not in entry["facts"]:
                        raise CheckpointError(f"{self.path} lacks the fact {fact} of {name}; start over with --fresh")
                    typed(hint, entry["facts"][fact], f"{self.path}: the fact {fact} of {name}", CheckpointError)

    def get(self, name: str) -> FinishedStep | None:
        """What a finished step was and found; None if it is not finished."""
        entry = self._steps.get(name)
        if entry is None:
            return None
        return FinishedStep(entry["settings"], entry["seconds"], entry["facts"])

    def data_settings(self) -> dict[str, Any]:
        """What the finished steps were told of the data set's parts and metric."""
        return {
            name: value for entry in self._steps.values() for name, value in entry["settings"].get("data", {}).items()
        }

    def add(self, name: str, settings: Mapping[str, Any], seconds: float, facts: Mapping[str, Any]) -> None:
        """Mark a step as finished; raises StorageError."""
        self._steps[name] = {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "settings": json.loads(json.dumps(dict(settings))),
            "facts": dict(facts),
        }
        self._save()

    def remove(self, *names: str) -> None:
        """Forget that steps were finished; raises StorageError."""
        if any(self._steps.pop(name, None) is not None for name in list(names)):
            self._save()

    def _save(self) -> None:
        save_artefact(self.path, KIND, SCHEMA_VERSION, self._steps, CheckpointError)
