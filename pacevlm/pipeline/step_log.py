"""`steps.json`: which steps of a run are finished, with which settings, and what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pacevlm.config import changed_settings
from pacevlm.errors import CheckpointError
from pacevlm.files import read_json, write_json_atomic

STEP_LOG_NAME = "steps.json"


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
            values = read_json(self.path, "list of finished steps", CheckpointError)
            try:
                self._steps = {str(name): dict(entry) for name, entry in values.items()}
                for name in self._steps:
                    self.get(name)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.path} is malformed ({error!r}); start over with --fresh") from error

    def get(self, name: str) -> FinishedStep | None:
        """What a finished step was and found; None if it is not finished."""
        entry = self._steps.get(name)
        if entry is None:
            return None
        return FinishedStep(dict(entry["settings"]), float(entry["seconds"]), dict(entry["facts"]))

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
        write_json_atomic(self.path, self._steps)

    def remove(self, *names: str) -> None:
        """Forget that steps were finished; raises StorageError."""
        if any(self._steps.pop(name, None) is not None for name in list(names)):
            write_json_atomic(self.path, self._steps)
