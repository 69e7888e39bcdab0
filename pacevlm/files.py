"""Reading and writing files: whole or not at all, in JSON, JSON lines and safetensors only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pacevlm.errors import CheckpointError, PacevlmError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

# What no number in a file of ours comes near, and what 64 bits hold.
MAX_WHOLE = 2**63 - 1


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder to write to, and rename it to `path` when the block ends well.

    A reader, or a run that restarts after a crash, sees the old file or the new one, never half of one. The content
    reaches the disk before the name changes. Missing parent folders are created. The temporary name ends in `.tmp`,
    so a writer that guesses a format from the name has to be told it (`savefig(..., format="png")`).

    Raises:
        StorageError: the file could not be written, for example because the disk is full; the temporary file is gone
            and `path` is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, PacevlmError):
            raise _storage_error(path, error) from error
        raise
    _sync_folder(path.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text whole or not at all; raises StorageError as `write_atomic` does."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_new(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> None:
    """Write a file whole or not at all; one that is there stays, unless `overwrite` is set or it holds the same.

    Raises:
        StorageError: there is another file or a folder of this name, or the file could not be written.
    """
    if os.path.lexists(path):
        check_regular(path, "file", StorageError)
        if os.path.getsize(path) == len(content) and read_bytes(path, "file", StorageError) == content:
            return
        if not overwrite:
            raise StorageError(
                f"{os.fspath(path)} is there already and holds something else; give another name, or set overwrite"
            )
    with write_atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, whole or not at all.

    NaN and infinity are not JSON: store None where a number is undefined.

    Raises:
        StorageError: the file could not be written.
        TypeError, ValueError: the value holds something that JSON has no form for; nothing is written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def read_json(path: str | os.PathLike[str], what: str, error: type[PacevlmError]) -> Any:
    """Read a JSON file, as strictly as `parse_json` does.

    Args:
        what: what the file is meant to be, for the message: "latency profile".
        error: the class of error to raise.

    Raises:
        error: the file is missing, unreadable, no regular file or not JSON.
    """
    content = read_bytes(path, what, error)  # outside the handler: its errors are ValueErrors as well
    try:
        return parse_json(content)
    except ValueError as cause:
        raise error(f"{what} {os.fspath(path)} is not valid JSON ({cause}); it is damaged or another file") from cause


def parse_json(data: bytes | str) -> Any:
    """Read JSON, and no more than JSON: UTF-8, finite numbers, whole ones of 64 bits, each key once, whole characters.

    Raises:
        ValueError: it is anything else, or nested too deeply.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=_whole
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character, and fails
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object holds a key twice")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError(f"the number {token[:40]} is too large")
    return number


def _whole(token: str) -> int:
    # Before int(), whose time grows with the square of the digits.
    if len(token) > len(str(MAX_WHOLE)) + 1 or abs(int(token)) > MAX_WHOLE:
        raise ValueError(f"the number {token[:40]} is too large")
    return int(token)


def append_jsonl(path: str | os.PathLike[str], *records: Mapping[str, Any]) -> None:
    """Append records to a JSON-lines file, one line each, all of them in one write.

    Each file has one writer at a time. A process that is killed loses at most its last call, and what a killed writer
    left of a last line is repaired first, so that the new records never continue it. Nothing is forced to the disk:
    after a power cut the newest lines may be missing.

    Raises:
        StorageError: the records could not be written; the file is as long as it was.
        TypeError, ValueError: a record holds something that JSON has no form for; nothing is written.
    """
    path = Path(path)
    lines = "".join(json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair_last_line(path)
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END) if file.seekable() else 0
            try:
                _write_all(file.fileno(), lines.encode())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        raise _storage_error(path, error) from error


def read_jsonl(path: str | os.PathLike[str], what: str, error: type[PacevlmError]) -> list[dict[str, Any]]:
    """Read every record of a JSON-lines file.

    The last line may be torn, because a process can be killed while it appends. A last line without its line end counts
    if it is a whole record and is left out if it is not (no beginning of a JSON object is itself one). Blank lines are
    skipped. Damage anywhere else is an error.

    Args:
        what: what the file is meant to be, for the message: "rollout log".
        error: the class of error to raise.

    Raises:
        error: the file is missing or unreadable, or a line that is not torn holds no JSON object.
    """
    return [record for _, record in read_numbered_jsonl(path, what, error)]


def read_numbered_jsonl(
    path: str | os.PathLike[str], what: str, error: type[PacevlmError]
) -> list[tuple[int, dict[str, Any]]]:
    """`read_jsonl` with the number of each record's line, counted from 1, for messages."""
    lines = read_bytes(path, what, error).split(b"\n")
    records: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line)
        if record is not None:
            records.append((number, record))
        elif line.strip() and number < len(lines):
            raise error(f"{what} {os.fspath(path)} is damaged: line {number} is no JSON object")
    return records


def save_safetensors_atomic(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors and string metadata as one safetensors file, whole or not at all.

    Args:
        tensors: any shapes, dtypes and devices; no two may share memory.

    Raises:
        StorageError: the file could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with write_atomic(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # what safetensors makes of an error while it writes
            raise _storage_error(Path(path), error) from error


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, onto the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt or not safetensors.
    """
    from safetensors.torch import load_file

    with _reading_safetensors(path):
        return load_file(path)


def load_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the string metadata of a safetensors file without reading its tensors.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt or not safetensors.
    """
    from safetensors import safe_open

    with _reading_safetensors(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def sha256_file(path: str | os.PathLike[str], error: type[PacevlmError] = CheckpointError) -> str:
    """SHA-256 of a file's content, 64 lower-case hexadecimal digits; raises `error` if it cannot be read."""
    check_regular(path, "file", error)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise error(f"{os.fspath(path)} cannot be read: {cause.strerror or cause}") from cause


def portable_path(
    path: str | os.PathLike[str], origin: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> tuple[str, str | None]:
    """How to name a file in another one, so that both can move.

    Args:
        path: the file to name.
        origin: the folder that relative names start from.
        folder: what moves as one; it holds `origin` or is it.

    Returns:
        A name relative to `origin` if the file lies in the folder or beside it, its absolute path if not; and, for
        what lies beside, the absolute path, for a folder that moves alone.
    """
    absolute, home = os.path.abspath(path), os.path.abspath(folder)
    if not Path(absolute).is_relative_to(os.path.dirname(home)):
        return absolute, None
    return os.path.relpath(absolute, os.path.abspath(origin)), None if Path(absolute).is_relative_to(home) else absolute


def find_portable(name: str, absolute: str | None, origin: str | os.PathLike[str]) -> str:
    """Absolute path of what `portable_path` named, wherever `origin` lies now; it need not exist."""
    here = os.path.normpath(os.path.join(os.path.abspath(origin), name))
    return absolute if absolute is not None and not os.path.exists(here) else here


@contextmanager
def _reading_safetensors(path: str | os.PathLike[str]) -> Iterator[None]:
    from safetensors import SafetensorError

    check_regular(path, "checkpoint file", CheckpointError)
    try:
        yield
    # A header of a known form but with unknown contents fails in the library's own tables.
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} cannot be read as safetensors ({error}); it is truncated, damaged or another format: "
            "copy or create it again"
        ) from error


def read_bytes(
    path: str | os.PathLike[str], what: str, error: type[PacevlmError], *, max_bytes: int | None = None
) -> bytes:
    """A file's content; raises `error` if it is missing, unreadable or no regular file, and never waits for one.

    Args:
        max_bytes: larger files are refused as well, before they fill the memory.
    """
    check_regular(path, what, error)
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as cause:
        raise error(f"{what} {os.fspath(path)} cannot be read: {cause.strerror or cause}") from cause
    if max_bytes is not None and len(content) > max_bytes:
        raise error(f"{what} {os.fspath(path)} has more than {max_bytes} bytes; check whether it is the right file")
    return content


def check_regular(path: str | os.PathLike[str], what: str, error: type[PacevlmError]) -> None:
    """Refuse folders, pipes and devices; opening a pipe would wait until somebody writes."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as cause:
        raise error(f"there is no {what} at {os.fspath(path)}; check the path") from cause
    except (OSError, ValueError) as cause:  # ValueError: a null character in the path
        raise error(
            f"{what} {os.fspath(path)!r} cannot be read: {getattr(cause, 'strerror', None) or cause}"
        ) from cause
    if not stat.S_ISREG(mode):
        raise error(f"{what} {os.fspath(path)} cannot be read: it is a folder or no regular file; check the path")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, or None if it holds no whole one."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _repair_last_line(path: Path) -> None:
    """End a last line that is whole but for its line end; cut off one that is torn."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()  # only after a crash, so once
        start = content.rfind(b"\n") + 1
        if _parse_record(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets a folder be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _storage_error(path: Path, error: Exception) -> StorageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StorageError(
        f"{path} could not be written: {reason}. Nothing half-written is left; free some space or choose another "
        "folder, then run again"
    )
