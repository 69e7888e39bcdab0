from __future__ import annotations

import pytest

from pacevlm.errors import DataError
from recipes.embedded_model.breakdown import HEIGHT_BIN_NAMES, accuracy_table, format_table, height_bin

RECORDS = [
    ({"family": "sum", "digit_height_px": 9}, 0.0),
    ({"family": "sum", "digit_height_px": 11}, 1.0),
    ({"family": "sum", "digit_height_px": 30}, 1.0),
    ({"family": "count", "digit_height_px": 30}, 0.0),
]


def test_bins_cover_every_height_once_and_in_order() -> None:
    names = [height_bin(height_px) for height_px in range(8, 41)]
    assert tuple(dict.fromkeys(names)) == HEIGHT_BIN_NAMES == ("8-11", "12-15", "16-23", "24-40")
    assert [names.count(name) for name in HEIGHT_BIN_NAMES] == [4, 4, 8, 17]


@pytest.mark.parametrize("height_px", [0, 7, 41])
def test_heights_outside_the_bins_are_refused(height_px: int) -> None:
    with pytest.raises(DataError, match=f"digit height {height_px} "):
        height_bin(height_px)


def test_table_holds_means_counts_and_sums_over_both_sides() -> None:
    assert accuracy_table(RECORDS) == {
        "count": {"24-40": {"accuracy": 0.0, "n": 1}, "all": {"accuracy": 0.0, "n": 1}},
        "sum": {
            "8-11": {"accuracy": 0.5, "n": 2},
            "24-40": {"accuracy": 1.0, "n": 1},
            "all": {"accuracy": 2 / 3, "n": 3},
        },
        "all": {
            "8-11": {"accuracy": 0.5, "n": 2},
            "24-40": {"accuracy": 0.5, "n": 2},
            "all": {"accuracy": 0.5, "n": 4},
        },
    }
    assert accuracy_table([]) == {}


def test_missing_metadata_is_refused() -> None:
    with pytest.raises(DataError, match="lacks digit_height_px"):
        accuracy_table([({"family": "sum"}, 1.0)])


def test_text_has_a_line_per_family_and_aligned_columns() -> None:
    lines = format_table(accuracy_table(RECORDS)).splitlines()
    assert [line.split()[0] for line in lines] == ["family", "count", "sum", "all"]
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["sum", "50.0", "(2)", "-", "-", "100.0", "(1)", "66.7", "(3)"]
