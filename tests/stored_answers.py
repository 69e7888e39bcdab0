"""What the file of an outcome store holds, read past the package."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    content: str
    knobs: str
    answer: str
    num_prompt_tokens: int
    num_output_tokens: int


def read_answers(path: Path) -> list[Row]:
    with closing(sqlite3.connect(path)) as database:
        return [Row(*row) for row in database.execute("SELECT * FROM outcomes")]


def change(path: Path, statement: str, *parameters: object) -> None:
    """Change a file as no writer of the package would."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute(statement, parameters)
