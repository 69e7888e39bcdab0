"""JSON artefacts of this package: every file names its kind and schema version, and reading checks both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pacevlm.errors import ProfileError
from pacevlm.files import read_json, write_json_atomic


def save_artefact(path: str | os.PathLike[str], kind: str, schema_version: int, content: Mapping[str, Any]) -> None:
    """Write an artefact, whole or not at all; floats read back bit for bit.

    Raises:
        ProfileError: the content holds a value that JSON has no form for, such as NaN.
        StorageError: the file could not be written; an older file at `path` is untouched.
    """
    try:
        write_json_atomic(path, {"kind": kind, "schema_version": schema_version, **content})
    except (TypeError, ValueError) as error:
        raise ProfileError(f"this {kind} cannot be written as JSON: {error}") from error


def load_artefact(path: str | os.PathLike[str], kind: str, schema_version: int) -> dict[str, Any]:
    """Read what `save_artefact` wrote and return its content.

    Raises:
        ProfileError: the file is missing, not JSON, of another kind or of another schema version.
    """
    values = read_json(path, kind, ProfileError)
    found = values.get("kind") if isinstance(values, dict) else type(values).__name__
    if found != kind:
        raise ProfileError(f"{os.fspath(path)} holds {found!r}, not a {kind}; check the path")
    if values.get("schema_version") != schema_version:
        raise ProfileError(
            f"the {kind} at {os.fspath(path)} has schema version {values.get('schema_version')!r}, "
            f"but this version of pacevlm reads {schema_version}; make it anew"
        )
    return {key: value for key, value in values.items() if key not in ("kind", "schema_version")}


def check_keys(what: str, values: Any, expected: set[str]) -> None:
    """Raise ProfileError unless `values` is a mapping with exactly these keys."""
    if not isinstance(values, Mapping) or set(values) != expected:
        found = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise ProfileError(f"{what} must have the keys {sorted(expected)}, not {found}")
