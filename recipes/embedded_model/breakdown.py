"""Accuracy broken down by question family and digit height."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pacevlm.errors import DataError

# (smallest, largest) height in pixels, both inclusive
HEIGHT_BINS = ((8, 11), (12, 15), (16, 23), (24, 40))
HEIGHT_BIN_NAMES = tuple(f"{smallest}-{largest}" for smallest, largest in HEIGHT_BINS)
ALL = "all"

AccuracyTable = dict[str, dict[str, dict[str, float]]]


def height_bin(height_px: int) -> str:
    """The name of the bin that a digit height falls in, for example `"16-23"`; raises DataError outside all bins."""
    for name, (smallest, largest) in zip(HEIGHT_BIN_NAMES, HEIGHT_BINS, strict=True):
        if smallest <= height_px <= largest:
            return name
    raise DataError(f"digit height {height_px} is in none of the bins {', '.join(HEIGHT_BIN_NAMES)} (pixels)")


def accuracy_table(records: Iterable[tuple[Mapping[str, Any], float]]) -> AccuracyTable:
    """Mean accuracy and count for each family and height bin, with `"all"` for the sums over either.

    Args:
        records: pairs of an example's metadata (`family`, `digit_height_px`) and its accuracy from 0 to 1.

    Returns:
        `table[family][bin] == {"accuracy": mean, "n": count}`; families and bins without records are left out.

    Raises:
        DataError: metadata lacks `family` or `digit_height_px`, or the height is in no bin.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for metadata, accuracy in records:
        missing = [key for key in ("family", "digit_height_px") if key not in metadata]
        if missing:
            raise DataError(f"metadata {dict(metadata)} lacks {' and '.join(missing)}, which the breakdown needs")
        row, column = str(metadata["family"]), height_bin(metadata["digit_height_px"])
        for cell in ((row, column), (row, ALL), (ALL, column), (ALL, ALL)):
            cells.setdefault(cell, []).append(float(accuracy))
    rows = [*sorted({row for row, _ in cells} - {ALL}), ALL]
    table: AccuracyTable = {}
    for row in rows:
        for column in (*HEIGHT_BIN_NAMES, ALL):
            values = cells.get((row, column))
            if values:
                cell_stats = {"accuracy": math.fsum(values) / len(values), "n": len(values)}
                table.setdefault(row, {})[column] = cell_stats
    return table


def format_table(table: AccuracyTable) -> str:
    """Render an accuracy table as text: one line per family, `accuracy % (n)` per height bin, `-` where empty."""
    columns = (*HEIGHT_BIN_NAMES, ALL)
    lines = [["family", *(name if name == ALL else f"{name} px" for name in columns)]]
    for row, cells in table.items():
        texts = [f"{100 * cells[c]['accuracy']:.1f} ({cells[c]['n']:.0f})" if c in cells else "-" for c in columns]
        lines.append([row, *texts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
