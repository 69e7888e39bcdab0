"""Nothing that comes from outside can command a terminal or begin a line of its own."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from pacevlm.printing import printable, printable_lines

COMMANDING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_no_character_of_unicode_acts_once_it_is_printable() -> None:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(text)
    shown.encode()
    assert not {unicodedata.category(character) for character in shown} & COMMANDING
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jno\rpacevlm: error: forged\n", r"\x1b[2Jno\rpacevlm: error: forged\n"),
        ("\u202egnp.exe \u2066x\u2069", r"\u202egnp.exe \u2066x\u2069"),
        ("a\u200bb\u2028c\x7fd\x9b", r"a\u200bb\u2028c\x7fd\x9b"),
        ("file-\udcff.png", r"file-\udcff.png"),
        ("Wie groß?\u00a0日本語 [red]5 cm²[/red] 🙂", "Wie groß?\u00a0日本語 [red]5 cm²[/red] 🙂"),
    ],
)
def test_what_acts_is_shown_and_the_rest_stays(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_line_ends_that_are_ours_stay() -> None:
    assert printable_lines("a\tb\nc\r\n") == "a\\tb\nc\\r\n"
