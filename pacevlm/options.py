"""What a command line and its settings file say."""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from pacevlm.checks import check_path
from pacevlm.config_file import ConfigFile
from pacevlm.errors import ConfigError
from pacevlm.printing import printable, printable_lines

OptionsT = TypeVar("OptionsT")

# What cannot be used ends a command with this.
USAGE_ERROR = 2
MIN_COLUMNS, MAX_COLUMNS = 20, 400
CONFIG_HELP = (
    'TOML file of settings: `steps = 300` below `[train]` is --train.steps 300; names have underscores, "None" is '
    "None. The command line wins over the file, the file over the run directory and the defaults. Relative paths in "
    "it start from its folder."
)


def parse_options(
    command: Callable[[Sequence[str]], int | None],
    kind: type[OptionsT],
    arguments: Sequence[str],
    *,
    default: OptionsT | None = None,
) -> OptionsT:
    """Options of a command; exits with a message if they are unknown or malformed, or if help was asked for.

    Args:
        command: the function that runs it; its name is the command's, its docstring the help.
    """
    settings: dict[str, Any] = {} if default is None else {"default": default}
    description = inspect.cleandoc(command.__doc__ or "")

    def parse(words: Sequence[str]) -> OptionsT:
        return tyro.cli(  # type: ignore[no-any-return]
            kind, prog=f"pacevlm {command.__name__}", description=description, args=list(words), **settings
        )

    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint), _usual_width():
            return parse(arguments)
    except SystemExit as stop:
        if stop.code == USAGE_ERROR and (shown := [printable(word) for word in arguments]) != list(arguments):
            # Said of the words as they can be shown: as given, they could begin lines of their own in the message.
            complaint = io.StringIO()
            with _usual_width(), redirect_stderr(complaint), redirect_stdout(io.StringIO()), suppress(SystemExit):
                parse(shown)
        if stop.code == USAGE_ERROR:
            print(printable_lines(complaint.getvalue()) or "the arguments cannot be used", end="", file=sys.stderr)
        raise


def parse_settings(
    command: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str],
    settings: object,
    file: ConfigFile | None = None,
    *switches: tuple[str, Any, Any],
) -> Any:
    """The options of a command with a settings file; `.settings` are those given, with those of the file on top."""
    described = tyro.conf.arg(name="config", metavar="FILE", help=CONFIG_HELP)
    # Made here, because the command line needs no settings of a run before a run is wanted.
    options_type = dataclasses.make_dataclass(
        "Options",
        [
            ("settings", Annotated[type(settings), tyro.conf.arg(name="")]),
            ("file", Annotated[Path | None, described], dataclasses.field(default=None)),
            *switches,
        ],
        frozen=True,
    )
    default = options_type(settings if file is None else file.on_top_of(settings))
    return parse_options(command, options_type, arguments, default=default)


def given_file(arguments: Sequence[str], read: Callable[[str], ConfigFile]) -> ConfigFile | None:
    """The settings file that a command line names, read; raises ConfigError if it names several."""
    given = _given(arguments, "--config")
    if len(given) > 1:
        raise ConfigError(f"--config is given {len(given)} times; put all settings into one file")
    return None if given in ([], [None]) else read(str(given[0]))


def given_run_dir(arguments: Sequence[str]) -> Path | None:
    """The run directory that a command line names."""
    found = _given(arguments, "--run-dir", "--run_dir")[-1:]
    if found in ([], [None]):
        return None
    check_path("run_dir", found[0])
    return Path(str(found[0]))


def _given(arguments: Sequence[str], *names: str) -> list[str | None]:
    """What a command line gives for an option, read before the rest because all other defaults follow from it."""
    words = [(argument.partition("="), following) for argument, following in zip_longest(arguments, arguments[1:])]
    return [value if equals else following for (name, equals, value), following in words if name in names]


@contextmanager
def _usual_width() -> Iterator[None]:
    """Lay the help out in a width that people have: with columns that hold no word, or thousands, it takes minutes."""
    given = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(max(shutil.get_terminal_size().columns, MIN_COLUMNS), MAX_COLUMNS))
    try:
        yield
    finally:
        if given is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = given
