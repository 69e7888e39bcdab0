"""JSON artefacts: each names its kind and schema version and carries its digest; reading checks these and all types."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pacevlm.errors import PacevlmError, ProfileError
from pacevlm.files import parse_json, read_bytes, write_json_atomic
from pacevlm.knobs import Knobs

ADDED_LATER = "added later"
"""In the metadata of a dataclass's field: files from before it do not have it, and get its default."""
_HEADER = ("kind", "schema_version", "sha256")


# Files ---------------------------------------------------------------------------------------------------------------


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
    data = read_bytes(path, kind, error)
    try:
        values = parse_json(data)
        digest = _text_sha256(data.decode())
    except (ValueError, RecursionError) as cause:
        raise error(f"{kind} {os.fspath(path)} is not valid JSON ({cause}); it is damaged or another file") from cause
    found = values.get("kind") if isinstance(values, dict) else type(values).__name__
    if found != kind:
        raise error(f"{os.fspath(path)} holds {shown(found)}, not a {kind}; check the path")
    if values.get("schema_version") != schema_version or isinstance(values["schema_version"], bool):
        raise error(
            f"the {kind} at {os.fspath(path)} has schema version {shown(values.get('schema_version'))}, "
            f"but this version of pacevlm reads {schema_version}; make it anew"
        )
    if values.get("sha256") != digest:
        raise error(
            f"the {kind} at {os.fspath(path)} was changed or damaged since it was written (its digest "
            "differs); make it anew"
        )
    return {key: value for key, value in values.items() if key not in _HEADER}


def content_sha256(values: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys, 64 hexadecimal digits."""
    return _text_sha256(json.dumps(values))


def _text_sha256(text: str) -> str:
    """The digest of JSON text without its own entry. Numbers count as written: 1.0 is not 1, and 1e5 not 1E5."""
    values = json.loads(text, parse_float=_number, parse_int=_number)
    if isinstance(values, dict):
        values.pop("sha256", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _number(token: str) -> list[str]:
    return ["number", token]


# Types ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest allowed number, or length of a text, list or mapping; a text must be printable as well."""

    least: float
    most: float


# A thousand million milliseconds are eleven days, and no request takes less than a nanosecond.
MAX_MS = 1e9
MAX_COUNT = 10**12

Ms = Annotated[float, Range(1e-6, MAX_MS)]
Duration = Annotated[float, Range(0.0, MAX_MS)]
Share = Annotated[float, Range(0.0, 1.0)]
Count = Annotated[int, Range(0, MAX_COUNT)]
Text = Annotated[str, Range(1, 4096)]
Sha256 = Annotated[str, Range(64, 64)]


def typed(hint: Any, value: Any, where: str, error: type[PacevlmError] = ProfileError) -> Any:
    """A JSON value as the type that a hint names: nothing is left out, added or converted, and no number is NaN.

    Args:
        hint: bool, int, float (which a whole number is as well), str, None, Knobs, Literal, a union, a tuple, a list,
            a mapping with text keys, a TypedDict (read as a dict), a dataclass (all its settings, then its own checks),
            Any, or Annotated with a `Range` of one of them.
        value: what JSON gave.
        where: what the value is, for messages.
        error: class of error to raise.

    Raises:
        error: the value is of another type or outside its range.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        result = typed(arguments[0], value, where, error)
        for limits in arguments[1:]:
            _check_range(limits, result, where, error)
        return result
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (choice,) = (argument for argument in arguments if argument is not type(None))
        return typed(choice, value, where, error)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise error(f"{where} is {shown(value)}; it must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise error(f"{where} is {shown(value)}; it must be a list")
        each = arguments[:1] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
        if len(each) != len(value):
            raise error(f"{where} has {len(value)} entries; it must have {len(each)}")
        entries = (
            typed(inner, item, f"{where}[{i}]", error) for i, (inner, item) in enumerate(zip(each, value, strict=True))
        )
        return list(entries) if origin is list else tuple(entries)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise error(f"{where} is {shown(value)}; it must be a mapping")
        return {
            typed(arguments[0], key, f"a key of {where}", error): typed(arguments[1], item, f"{where}.{key}", error)
            for key, item in value.items()
        }
    if hint is Knobs:
        try:
            return Knobs.parse(typed(str, value, where, error))
        except PacevlmError as cause:
            raise error(f"{where}: {cause}") from cause
    if typing.is_typeddict(hint):
        return _typed_entries(hint, hint.__required_keys__, value, where, error)
    if dataclasses.is_dataclass(hint):
        names = {entry.name for entry in dataclasses.fields(hint) if entry.init}
        later = {entry.name for entry in dataclasses.fields(hint) if entry.metadata.get(ADDED_LATER)}
        given = set(value) if isinstance(value, Mapping) else set()
        settings = _typed_entries(hint, names - (later - given), value, where, error)
        try:
            return hint(**settings)  # type: ignore[operator]
        except PacevlmError as cause:
            raise error(f"{where}: {cause}") from cause
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise error(f"{where} is {shown(value)}; it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f"{where} is {value}; it must be a finite number")
    return value


def check_keys(what: str, values: Any, expected: set[str], error: type[PacevlmError] = ProfileError) -> None:
    """Raise `error` unless `values` is a mapping with exactly these keys."""
    if not isinstance(values, Mapping) or set(values) != expected:
        found = shown(sorted(map(str, values))) if isinstance(values, Mapping) else type(values).__name__
        raise error(f"{what} must have the keys {sorted(expected)}, not {found}")


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _typed_entries(
    kind: Any, required: typing.AbstractSet[str], value: Any, where: str, error: type[PacevlmError]
) -> dict[str, Any]:
    optional = _hints(kind).keys() - required if typing.is_typeddict(kind) else set()
    given = set(value) if isinstance(value, Mapping) else set()
    check_keys(where, value, set(required) | (optional & given), error)
    return {name: typed(_hints(kind)[name], item, f"{where}.{name}", error) for name, item in value.items()}


def _check_range(limits: Range, value: Any, where: str, error: type[PacevlmError]) -> None:
    if isinstance(value, (int, float)):
        if not limits.least <= value <= limits.most:
            raise error(f"{where} is {value!r}; it must lie in {limits.least:g}..{limits.most:g}")
    elif not limits.least <= len(value) <= limits.most:
        raise error(f"{where} has the length {len(value)}; it must have {limits.least:g} to {limits.most:g}")
    elif isinstance(value, str) and not value.isprintable():
        raise error(f"{where} is {shown(value)}; it must be printable")
