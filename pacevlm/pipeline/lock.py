"""One writer for each folder, by a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pacevlm.errors import ConfigError, StorageError

# It stays when the writer is done, and so also tells that a folder is a run's.
LOCK_NAME = ".pacevlm-run.lock"


@contextmanager
def one_writer(folder: str | os.PathLike[str], lock_name: str = LOCK_NAME) -> Iterator[None]:
    """Be the only one that writes into a folder while the block runs; the folder is made if it is missing.

    Raises:
        ConfigError: another process, or another call in this one, is writing there.
        StorageError: the folder cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / lock_name)
        lock.acquire(blocking=False)
    except Timeout as cause:
        raise ConfigError(
            f"{path} is in use: another process is writing there. Wait until it ends or stop it, or give another folder"
        ) from cause
    except OSError as cause:
        raise StorageError(
            f"{path} cannot be written: {cause.strerror or cause}. Give a folder that can, or free some space"
        ) from cause
    try:
        yield
    finally:
        lock.release()
