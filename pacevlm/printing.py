"""How things are printed; what comes from outside can neither command a terminal nor begin a line of its own."""

from __future__ import annotations

import unicodedata


def printable(text: object) -> str:
    r"""Text as one line in which every character shows; what would act instead is written as an escape, such as `\x1b`.

    Escaped are control characters, line and paragraph separators, what changes the direction or the width of writing,
    surrogates (undecodable bytes of file names) and what Unicode has not assigned. Blanks stay.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in line
    )


def printable_lines(text: str) -> str:
    """The same for a text whose line ends are its own."""
    return "\n".join(map(printable, text.split("\n")))


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
