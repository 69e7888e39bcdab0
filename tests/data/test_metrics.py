from __future__ import annotations

import pytest

from pacevlm.data.metrics import exact_match, normalise_answer


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("7", "7"), (" 7\n", "7"), ("Red", "red"), ("4  7\t1", "4 7 1"), ("LIGHT Blue", " light\nblue "), ("", " ")],
)
def test_same_text_matches_in_both_directions(prediction: str, reference: str) -> None:
    assert exact_match(prediction, reference) == exact_match(reference, prediction) == 1.0


@pytest.mark.parametrize(("prediction", "reference"), [("7", "1"), ("471", "4 7 1"), ("red.", "red"), ("", "0")])
def test_other_text_does_not_match(prediction: str, reference: str) -> None:
    assert exact_match(prediction, reference) == exact_match(reference, prediction) == 0.0


def test_normalisation_is_idempotent() -> None:
    once = normalise_answer("  A \n B\t c ")
    assert once == "a b c"
    assert normalise_answer(once) == once
