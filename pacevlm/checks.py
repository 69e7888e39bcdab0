"""What numbers, texts and paths that people give must be, said in one way."""

from __future__ import annotations

import math
import os
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from pacevlm.errors import ConfigError
from pacevlm.printing import printable

MAX_SEED = 2**32 - 1
"""Largest seed that NumPy's and torch's generators both take."""
MAX_COUNT = 10**7
"""Most examples, requests or steps that anything is asked for."""


def as_float(value: object) -> float | None:
    """Any real number, NumPy's included, as a float; None for what is none, is not finite or is too large for one."""
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
    except (ArithmeticError, ValueError):  # a fraction beyond the largest float, a signalling NaN
        return None
    return number if math.isfinite(number) else None


def as_int(value: object) -> int | None:
    """Any whole number, NumPy's included, as an int; None for what is none."""
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def whole_number(name: str, value: object) -> int:
    """A number of things as an int; raises ConfigError unless it is whole and at least 1."""
    number = as_int(value)
    if number is None or number < 1:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
    return number


def check_whole(config: Any, least: int, most: int, *names: str, optional: bool = False) -> None:
    """Fix the named settings as ints; raises ConfigError unless they are whole numbers from `least` to `most`.

    Args:
        optional: None is allowed too, and stays.
    """
    for name in names:
        value = getattr(config, name)
        if optional and value is None:
            continue
        number = as_int(value)
        if number is None or not least <= number <= most:
            raise ConfigError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most}")
        object.__setattr__(config, name, number)


def check_real(
    config: Any, low: float, high: float, *names: str, above: bool = False, below: bool = False, optional: bool = False
) -> None:
    """Fix the named settings as floats; raises ConfigError unless they are finite numbers from `low` to `high`.

    Args:
        above: `low` itself is outside.
        below: `high` itself is outside.
        optional: None is allowed too, and stays.
    """
    for name in names:
        value = getattr(config, name)
        if optional and value is None:
            continue
        number = as_float(value)
        if number is None or not low <= number <= high or (above and number == low) or (below and number == high):
            ends = f"{'above' if above else 'from'} {low:g} {'to below' if below else 'to'} {high:g}"
            raise ConfigError(f"{name} is {shown(value)}; it must be a number {ends}")
        object.__setattr__(config, name, number)


def check_path(name: str, value: object) -> None:
    """Raise ConfigError unless a setting is a path that can be opened, written down and printed."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {shown(value)}; it must be a path")
    if not text.strip():
        raise ConfigError(f"{name} is empty; give a path")
    if text.startswith("~"):
        raise ConfigError(f"{name} is {text!r}, but only a shell knows what ~ stands for; write the folder out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {text!r}, which is not UTF-8 text; rename the file or folder") from None
    if printable(text) != text:
        raise ConfigError(f"{name} is {text!r}, which holds a control character; rename the file or folder")


def shown(value: object) -> str:
    """A value as a message shows it, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
