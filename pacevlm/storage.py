"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pacevlm.errors import StorageError


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a whole file under a temporary name in the same folder, then rename it into place.

    Folders that are missing are made. Text is written as UTF-8. Returns the path.

    Raises:
        StorageError: the file could not be written; an earlier file of that name is left as it was.
    """
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a result is meant to be read by others as far as the umask allows.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StorageError(f"could not write {target}: {error.strerror or error}; check space and permissions") from error
    return target
