"""The metrics of a training run: one JSON line per step, and TensorBoard events if wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pacevlm.artefact import Text, typed
from pacevlm.errors import CheckpointError, ConfigError, StorageError
from pacevlm.files import append_jsonl, parse_json, read_numbered_jsonl

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class MetricsLog:
    """Writes the metrics of each step; on a continuation, steps after `last_step` are removed first.

    Args:
        path: JSON-lines file with one record per step, `step` first.
        last_step: the step that the run goes on from; 0 for a new run.
        tensorboard_dir: folder for TensorBoard events; None writes none.

    Raises:
        CheckpointError: the file holds a line that is not a record of this log.
        StorageError: the file cannot be written.
        ConfigError: TensorBoard is wanted but not installed.
    """

    def __init__(self, path: Path, last_step: int = 0, tensorboard_dir: Path | None = None) -> None:
        self.path = path
        self._events = None if tensorboard_dir is None else _open_events(tensorboard_dir, last_step)
        _keep_until(path, last_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step, counted from 1; raises StorageError."""
        append_jsonl(self.path, {"step": step, **metrics})
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Force what was written to the disk, so that no checkpoint outlives its metrics; raises StorageError."""
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            return  # nothing was written yet
        except OSError as error:
            raise StorageError(f"{self.path} could not be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The metrics of every step, in the order of the file; raises CheckpointError naming a line that is damaged."""
    records = read_numbered_jsonl(path, "training metrics", CheckpointError)
    return [typed(dict[Text, float], record, f"{path}, line {number}", CheckpointError) for number, record in records]


def _keep_until(path: Path, last_step: int) -> None:
    """Cut the file behind the record of `last_step`; a torn last line goes as well."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"the metrics {path} cannot be read: {error.strerror or error}") from error
    size = 0
    for line in content.splitlines(keepends=True):
        try:
            step = typed(dict[Text, float], parse_json(line), "a line", CheckpointError)["step"]
        except (ValueError, KeyError) as error:
            if not line.endswith(b"\n"):
                break  # torn by a kill while it was written
            raise CheckpointError(
                f"the metrics {path} are damaged at byte {size}; move the file away to go on without its past"
            ) from error
        # A record without its line end is whole but might be continued: written again, it gets one.
        if step > last_step or not line.endswith(b"\n"):
            break
        size += len(line)
    if size < len(content):
        try:
            os.truncate(path, size)
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror or error}") from error


def _open_events(folder: Path, last_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard is switched on but not installed; run `pip install 'pacevlm[train]'` or switch it off"
        ) from error
    # TensorBoard leaves out what an earlier start wrote from purge_step on.
    return SummaryWriter(str(folder), purge_step=last_step + 1)
