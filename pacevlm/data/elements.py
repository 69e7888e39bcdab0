"""Chemical elements as knowledge: two digits are read as an atomic number, and the answer stands in no picture.

Names are those of IUPAC (aluminium, sulfur, caesium); the table ends at 99, the last number with two digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pacevlm.data.digits import BOX_GAP_PX, COLOUR_NAMES, Digit, Question, Scene, SceneConfig, render, split_scans


@dataclass(frozen=True)
class Element:
    """A chemical element."""

    symbol: str
    name: str


_TABLE = """
H hydrogen, He helium,
Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, F fluorine, Ne neon,
Na sodium, Mg magnesium, Al aluminium, Si silicon, P phosphorus, S sulfur, Cl chlorine, Ar argon,
K potassium, Ca calcium, Sc scandium, Ti titanium, V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt,
Ni nickel, Cu copper, Zn zinc, Ga gallium, Ge germanium, As arsenic, Se selenium, Br bromine, Kr krypton,
Rb rubidium, Sr strontium, Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Tc technetium, Ru ruthenium, Rh rhodium,
Pd palladium, Ag silver, Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, Xe xenon,
Cs caesium, Ba barium,
La lanthanum, Ce cerium, Pr praseodymium, Nd neodymium, Pm promethium, Sm samarium, Eu europium, Gd gadolinium,
Tb terbium, Dy dysprosium, Ho holmium, Er erbium, Tm thulium, Yb ytterbium, Lu lutetium,
Hf hafnium, Ta tantalum, W tungsten, Re rhenium, Os osmium, Ir iridium, Pt platinum, Au gold, Hg mercury,
Tl thallium, Pb lead, Bi bismuth, Po polonium, At astatine, Rn radon,
Fr francium, Ra radium,
Ac actinium, Th thorium, Pa protactinium, U uranium, Np neptunium, Pu plutonium, Am americium, Cm curium,
Bk berkelium, Cf californium, Es einsteinium
"""
ELEMENTS = tuple(Element(*entry.split()) for entry in _TABLE.split(","))
"""The elements by atomic number, the first at place 0."""

ELEMENT_FAMILIES = ("element_name", "element_symbol")
NAME_QUESTION = "Which element has this atomic number?"
SYMBOL_QUESTION = "What is the symbol of the element with this atomic number?"

# The two digits of a number are about as tall as each other and stand on about one line.
_MAX_HEIGHT_RATIO = 1.1
_MAX_RISE = 0.15


def element_questions(digits: Sequence[Digit]) -> list[Question]:
    """What can be asked about two digits as an atomic number, left to right: name and symbol, or nothing for 00.

    Args:
        digits: two digits, sorted from left to right.
    """
    tens, units = digits
    number = 10 * tens.value + units.value
    if not 1 <= number <= len(ELEMENTS):
        return []
    element, height_px = ELEMENTS[number - 1], min(tens.height_px, units.height_px)
    texts = ((NAME_QUESTION, element.name), (SYMBOL_QUESTION, element.symbol))
    return [
        Question(family, text, answer, height_px)
        for family, (text, answer) in zip(ELEMENT_FAMILIES, texts, strict=True)
    ]


def sample_number(rng: np.random.Generator, split: str, config: SceneConfig) -> Scene:
    """Draw a scene whose two digits stand side by side and make an atomic number, each number equally often.

    Args:
        rng: what is drawn from.
        split: whose scans are used.
        config: canvases and heights; its numbers of digits play no part.
    """
    width, height = config.usable_canvases[rng.integers(len(config.usable_canvases))]
    smallest, largest = config.height_range_px((width, height))
    tallest = int(rng.integers(smallest, min(largest, (width - BOX_GAP_PX) // 2) + 1))
    heights = [tallest, max(smallest, round(tallest / rng.uniform(1.0, _MAX_HEIGHT_RATIO)))]
    heights = [heights[i] for i in rng.permutation(2)]
    widths = [round(h * rng.uniform(0.85, 1.0)) for h in heights]
    gap = int(rng.integers(BOX_GAP_PX, max(BOX_GAP_PX, min(width - sum(widths), tallest // 2)) + 1))
    left = int(rng.integers(width - sum(widths) - gap + 1))
    rise = int(_MAX_RISE * tallest)
    bottom = int(rng.integers(tallest, height + 1))
    number = int(rng.integers(1, len(ELEMENTS) + 1))
    digits = []
    for value, digit_height, digit_width in zip(divmod(number, 10), heights, widths, strict=True):
        below = min(height, max(digit_height, bottom + int(rng.integers(-rise, rise + 1))))
        scans = split_scans()[split][value]
        colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
        box = (left, below - digit_height, left + digit_width, below)
        digits.append(Digit(value, colour, box, digit_height, scans[rng.integers(len(scans))]))
        left += digit_width + gap
    return Scene(render(rng, (width, height), digits), tuple(digits))
