"""Settings that people write into a TOML file, named as in code, and put on top of other settings."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pacevlm.checks import check_path, shown
from pacevlm.config import WITHIN_PACKAGE, config_from_dict, config_to_dict, is_hub_id
from pacevlm.dataset_list import with_paths
from pacevlm.errors import ConfigError, KnobError
from pacevlm.files import read_bytes

ConfigT = TypeVar("ConfigT")

MAX_BYTES = 1 << 15
"""Largest file of settings, several times what all of them and a comment on each would take."""
NONE = "None"
"""What stands for None, which TOML has no word for, as on the command line."""


@dataclass(frozen=True)
class ConfigFile:
    """What a TOML file of settings says.

    Attributes:
        path: the file, for messages.
        values: tables and values by name; paths are found and checked, all else is not.
    """

    path: Path
    values: Mapping[str, Any]

    def on_top_of(self, config: ConfigT) -> ConfigT:
        """The settings with what the file says instead; what it does not name stays.

        Raises:
            ConfigError: a name is unknown, a table stands for a value or a value for a table, or a value is of the
                wrong type or outside its range.
        """
        settings = config_to_dict(config)
        try:
            return config_from_dict(type(config), _merged(settings, self.values, list(_names(settings))))
        except (ConfigError, KnobError) as error:
            raise ConfigError(f"{self.path}: {error}") from error
        except RecursionError:
            raise ConfigError(f"{self.path}: a value is nested too deeply; no setting needs that") from None


def read_config_file(path: str | os.PathLike[str], paths: Iterable[tuple[str, ...]]) -> ConfigFile:
    """Read a TOML file of settings; relative paths in it start from the folder that holds it.

    Args:
        path: the file.
        paths: the settings that are paths, each by its tables and its name.

    Raises:
        ConfigError: the file is missing, unreadable, no regular file, too large, not UTF-8 or not TOML; or a path in it
            cannot be one.
    """
    check_path("config", path)
    content = read_bytes(path, "config file", ConfigError, max_bytes=MAX_BYTES)
    try:
        values = _parse(content)
        for names in paths:
            _find_path(values, names, os.path.dirname(path))
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error
    except RecursionError:
        raise ConfigError(f"{os.fspath(path)}: a value is nested too deeply; no setting needs that") from None
    return ConfigFile(Path(path), values)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"it is not UTF-8 text (at line {line}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        last_line = content.count(b"\n") + 1
        reason = str(error).replace("at end of document", f"at the end, line {last_line}")
        raise ConfigError(f"it is not TOML: {reason}") from error
    except ValueError as error:  # Python reads no numbers of thousands of digits
        raise ConfigError("it holds a number that is too large; no setting needs that") from error


def _find_path(values: dict[str, Any], names: tuple[str, ...], folder: str) -> None:
    """Let one path start from the folder of the file, if the file names it."""
    table: Any = values
    for name in names[:-1]:
        table = table.get(name, {})
        if not isinstance(table, dict):
            return  # said when the settings are made
    value = table.get(names[-1], NONE)
    if value not in (NONE, *WITHIN_PACKAGE):
        check_path(".".join(names), value)
        path = (
            with_paths(value, lambda path: os.path.join(folder, path))
            if names[-1] == "dataset"
            else os.path.join(folder, value)
        )
        # A model may be named by its id on the hub.
        if names[-1] != "path" or not is_hub_id(value) or os.path.exists(path):
            table[names[-1]] = path


def _names(settings: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Dotted names of all settings and tables."""
    for name, value in settings.items():
        yield f"{where}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{where}{name}.")


def _merged(
    settings: Mapping[str, Any], values: Mapping[str, Any], names: list[str], where: str = ""
) -> dict[str, Any]:
    """Settings with the values of a file instead, table by table; `names` are those of all settings, for messages."""
    merged = dict(settings)
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in settings:
            raise ConfigError(f"there is no setting {shown(name)}; {_meant(name, names, settings)}")
        is_table = isinstance(settings[key], Mapping)
        if is_table != isinstance(value, Mapping):
            what = f"a table of settings, [{name}]" if is_table else "a value, not a table"
            raise ConfigError(f"{name} is {shown(value)}; it must be {what}")
        merged[key] = _merged(settings[key], value, names, f"{name}.") if is_table else None if value == NONE else value
    return merged


def _meant(name: str, names: list[str], settings: Mapping[str, Any]) -> str:
    """Which settings an unknown one may stand for, in words; those of its table if none is near."""
    spelt = name.replace("-", "_")
    if name in names:
        return f"write {name} without quotes"
    if spelt in names:
        return f"write {spelt}, with underscores"

    def last(known: str) -> str:
        return known.rpartition(".")[2]

    # In another table, misspelt here, or both.
    near = [known for known in names if last(known) == last(spelt)]
    near = near or [name.removesuffix(last(name)) + key for key in get_close_matches(last(spelt), settings)]
    nearest = get_close_matches(last(spelt), map(last, names), n=1)
    near = near or [known for known in names if last(known) in nearest]
    return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(settings)}"
