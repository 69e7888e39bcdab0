"""What comes from outside, made safe to print: it can neither command a terminal nor begin a line of its own."""

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
