"""Atomic numbers: the table's facts, and scenes that show each number in a way that reads one way only."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pacevlm.data.digit_tasks import TASKS
from pacevlm.data.digits import SPLITS, load_scans, split_scans
from pacevlm.data.elements import ELEMENT_FAMILIES, ELEMENTS, element_questions, sample_number

CONFIG = TASKS["knowledge"].scenes
NOBLE_GASES = {2: "helium", 10: "neon", 18: "argon", 36: "krypton", 54: "xenon", 86: "radon"}
ALKALI_METALS = {3: "lithium", 11: "sodium", 19: "potassium", 37: "rubidium", 55: "caesium", 87: "francium"}
# Symbols that come from other names than the English ones, by number.
LATIN = {11: "Na", 19: "K", 26: "Fe", 29: "Cu", 47: "Ag", 50: "Sn", 51: "Sb", 74: "W", 79: "Au", 80: "Hg", 82: "Pb"}
# Symbols in reading order, from a list of their own.
SYMBOLS = (
    "HHeLiBeBCNOFNeNaMgAlSiPSClArKCaScTiVCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrYZrNbMoTcRuRhPdAgCdInSnSbTeIXeCsBaLaCePrNdPmSmEu"
    "GdTbDyHoErTmYbLuHfTaWReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaUNpPuAmCmBkCfEs"
)


def test_the_table_holds_the_elements_1_to_99_in_order() -> None:
    assert len(ELEMENTS) == 99
    assert "".join(element.symbol for element in ELEMENTS) == SYMBOLS
    assert len({element.name for element in ELEMENTS}) == len({element.symbol.lower() for element in ELEMENTS}) == 99
    for number, name in (NOBLE_GASES | ALKALI_METALS | {57: "lanthanum", 71: "lutetium", 92: "uranium"}).items():
        assert ELEMENTS[number - 1].name == name
    for number, element in enumerate(ELEMENTS, 1):
        assert element.name.isalpha()
        assert element.name.islower()
        if number in LATIN:
            assert element.symbol == LATIN[number]
        else:  # the name's first letter, and another of its letters in order
            assert element.symbol[0].lower() == element.name[0]
            assert all(letter in element.name[1:] for letter in element.symbol[1:])


def test_numbers_stand_side_by_side_and_large() -> None:
    rng = np.random.default_rng(0)
    _, values = load_scans()
    numbers: Counter[int] = Counter()
    for i in range(600):
        split = SPLITS[i % 3]
        scene = sample_number(rng, split, CONFIG)
        height, width = scene.image.shape[:2]
        assert (width, height) in CONFIG.canvases
        left, right = scene.digits
        numbers[10 * left.value + right.value] += 1
        assert left.box[2] < right.box[0]  # no column holds both
        for digit in scene.digits:
            assert 0 <= digit.box[0] < digit.box[2] <= width
            assert 0 <= digit.box[1] < digit.box[3] <= height
            assert digit.height_px == digit.box[3] - digit.box[1] >= CONFIG.min_height_px
            assert digit.scan_index in split_scans()[split][digit.value]
            assert values[digit.scan_index] == digit.value
        shared = min(left.box[3], right.box[3]) - max(left.box[1], right.box[1])
        assert shared >= 0.5 * min(left.height_px, right.height_px)  # they stand on one line
        name, symbol = element_questions(scene.digits)
        assert (name.family, symbol.family) == ELEMENT_FAMILIES
        number = int(f"{left.value}{right.value}")
        assert name.answer == ELEMENTS[number - 1].name
        assert symbol.answer == ELEMENTS[number - 1].symbol
        assert name.digit_height_px == symbol.digit_height_px == min(left.height_px, right.height_px)
    assert set(numbers) <= set(range(1, 100))
    assert len(numbers) > 90


def test_00_is_no_atomic_number() -> None:
    rng = np.random.default_rng(1)
    digits = sample_number(rng, "train", CONFIG).digits
    zero = type(digits[0])(0, "red", digits[0].box, digits[0].height_px, 0)
    assert element_questions((zero, zero)) == []
    with pytest.raises(ValueError, match="unpack"):
        element_questions((zero,))
