"""JSON artefacts: each names its kind and schema version, carries its digest, and reading checks all three."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from pacevlm.errors import PacevlmError, ProfileError
from pacevlm.files import read_json, write_json_atomic

_HEADER = ("kind", "schema_version", "sha256")


def save_artefact(
    path: str | os.PathLike[str],
    kind: str,
    schema_version: int,
    content: Mapping[str, Any],
    error: type[PacevlmError] = ProfileError,
) -> None:
    """Write an artefact, whole or not at all; floats read back bit for bit.

    Args:
        error: class of error to raise for content that cannot be written.

    Raises:
        error: the content holds a value that JSON has no form for, such as NaN.
        StorageError: the file could not be written; an older file at `path` is untouched.
    """
    try:
        # Through JSON once, so that the digest is of what will be read: tuples become lists, keys text.
        values = json.loads(json.dumps({"kind": kind, "schema_version": schema_version, **content}, allow_nan=False))
        write_json_atomic(path, {**values, "sha256": content_sha256(values)})
    except (TypeError, ValueError) as cause:
        raise error(f"this {kind} cannot be written as JSON: {cause}") from cause


def load_artefact(
    path: str | os.PathLike[str], kind: str, schema_version: int, error: type[PacevlmError] = ProfileError
) -> dict[str, Any]:
    """Read what `save_artefact` wrote and return its content.

    Args:
        error: class of error to raise.

    Raises:
        error: the file is missing, not JSON, of another kind or schema version, or was changed since it was written.
    """
    values = read_json(path, kind, error)
    found = values.get("kind") if isinstance(values, dict) else type(values).__name__
    if found != kind:
        raise error(f"{os.fspath(path)} holds {found!r}, not a {kind}; check the path")
    if values.get("schema_version") != schema_version:
        raise error(
            f"the {kind} at {os.fspath(path)} has schema version {values.get('schema_version')!r}, "
            f"but this version of pacevlm reads {schema_version}; make it anew"
        )
    stored = values.pop("sha256", None)
    if stored != content_sha256(values):
        raise error(
            f"the {kind} at {os.fspath(path)} was changed or damaged since it was written (its digest "
            "differs); make it anew"
        )
    return {key: value for key, value in values.items() if key not in _HEADER}


def content_sha256(values: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_keys(what: str, values: Any, expected: set[str], error: type[PacevlmError] = ProfileError) -> None:
    """Raise `error` unless `values` is a mapping with exactly these keys."""
    if not isinstance(values, Mapping) or set(values) != expected:
        found = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise error(f"{what} must have the keys {sorted(expected)}, not {found}")
