from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pacevlm.data.digits import (
    BOX_GAP_PX,
    CANVASES,
    COLOUR_JITTER,
    COLOUR_NAMES,
    COLOURS,
    FAMILIES,
    SPLITS,
    SUM_DIGITS,
    DigitVQA,
    Question,
    Scene,
    SceneConfig,
    load_scans,
    sample_scene,
    split_scans,
    valid_questions,
)
from pacevlm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(3)
    return [sample_scene(rng, SPLITS[i % 3]) for i in range(400)]


def expected_answer(scene: Scene, question: Question) -> tuple[str, int]:
    """Answer and smallest height that matters, worked out from the question's words alone."""
    digits = sorted(scene.digits, key=lambda digit: digit.box[0])
    smallest = min(digit.box[3] - digit.box[1] for digit in digits)
    words = question.text.rstrip("?.").split()
    match words:
        case ["Which", "digit", "is", "the", "largest"]:
            heights = sorted(digit.height_px for digit in digits)
            assert heights[-1] >= 1.25 * heights[-2]
            (found,) = [digit for digit in digits if digit.height_px == heights[-1]]
            return str(found.value), found.height_px
        case ["What", "colour", "is", "the", "largest", "digit"]:
            heights = sorted(digit.height_px for digit in digits)
            assert heights[-1] >= 1.25 * heights[-2]
            (found,) = [digit for digit in digits if digit.height_px == heights[-1]]
            return found.colour, found.height_px
        case ["Which", "digit", "is", "right", "of", "the", colour, "digit"]:
            ordered = sorted(digits, key=lambda digit: digit.box[0] + digit.box[2])
            (place,) = [i for i, digit in enumerate(ordered) if digit.colour == colour]
            found = ordered[place + 1]
            return str(found.value), min(found.height_px, ordered[place].height_px)
        case ["What", "is", "the", operation, "of", "the", colour, "digit", "and", "the", other, "digit"]:
            (first,) = [digit for digit in digits if digit.colour == colour]
            (second,) = [digit for digit in digits if digit.colour == other]
            assert first is not second
            answer = {"product": first.value * second.value, "difference": abs(first.value - second.value)}[operation]
            return str(answer), min(first.height_px, second.height_px)
        case ["Which", "digit", "is", colour]:
            (found,) = [digit for digit in digits if digit.colour == colour]
            return str(found.value), found.height_px
        case ["What", "colour", "is", "the", value]:
            (found,) = [digit for digit in digits if str(digit.value) == value]
            return found.colour, found.height_px
        case ["How", "many", "digits", "are", "there"]:
            return str(len(digits)), smallest
        case ["How", "many", colour, "digits", "are", "there"]:
            assert colour in COLOUR_NAMES
            return str([digit.colour for digit in digits].count(colour)), smallest
        case ["Read", "the", "digits", "from", "left", "to", "right"]:
            return " ".join(str(digit.value) for digit in digits), smallest
        case ["What", "is", "the", "sum", "of", "the", "digits"]:
            assert len(digits) in SUM_DIGITS
            return str(sum(digit.value for digit in digits)), smallest
    raise AssertionError(f"unknown question {question.text!r}")


def split_scan_indices(split: str) -> list[int]:
    return [index for by_value in split_scans()[split] for index in by_value]


def test_splits_partition_the_scans_and_are_stratified() -> None:
    parts = {split: split_scan_indices(split) for split in SPLITS}
    assert sorted(index for part in parts.values() for index in part) == list(range(1797))
    _, values = load_scans()
    totals = np.bincount(values)
    for split, fraction in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        counts = np.bincount(values[list(parts[split])], minlength=10)
        assert np.all(np.abs(counts - fraction * totals) <= 1.5)


def test_scenes_use_only_scans_of_their_split(scenes: list[Scene]) -> None:
    _, values = load_scans()
    for i, scene in enumerate(scenes):
        allowed = set(split_scan_indices(SPLITS[i % 3]))
        for digit in scene.digits:
            assert digit.scan_index in allowed
            assert digit.value == values[digit.scan_index]


def test_scenes_honour_the_ranges(scenes: list[Scene]) -> None:
    canvases, counts = set(), set()
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        canvases.add((width, height))
        counts.add(len(scene.digits))
        for digit in scene.digits:
            left, top, right, bottom = digit.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert digit.height_px == bottom - top
            assert 8 <= digit.height_px <= min(40, 0.6 * min(width, height))
            assert 0.8 * digit.height_px <= right - left <= digit.height_px
    assert canvases == set(CANVASES)
    assert counts == {1, 2, 3, 4}


def test_digits_keep_apart_and_have_a_clear_order(scenes: list[Scene]) -> None:
    for scene in scenes:
        for a, b in combinations([digit.box for digit in scene.digits], 2):
            x_gap = max(a[0], b[0]) - min(a[2], b[2])
            y_gap = max(a[1], b[1]) - min(a[3], b[3])
            assert max(x_gap, y_gap) >= BOX_GAP_PX
            width_a, width_b = a[2] - a[0], b[2] - b[0]
            assert -x_gap <= 0.3 * min(width_a, width_b)
            # `a` comes first in the scene, so it must be the left one.
            assert (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2 >= 0.6 * (width_a + width_b) / 2


def test_digits_are_painted_where_and_how_the_scene_says(scenes: list[Scene]) -> None:
    all_scans, _ = load_scans()
    for scene in scenes[:100]:
        outside = np.ones(scene.image.shape[:2], dtype=bool)
        for digit in scene.digits:
            left, top, right, bottom = digit.box
            outside[top:bottom, left:right] = False
            patch = scene.image[top:bottom, left:right].astype(np.int64)
            distance = {name: np.abs(patch - rgb).max(axis=2).min() for name, rgb in COLOURS.items()}
            # Some pixel carries nearly full ink, hence nearly the digit's own colour; no other colour comes closer.
            assert min(distance, key=lambda name: distance[name]) == digit.colour
            assert distance[digit.colour] <= COLOUR_JITTER + 50
            strongest = Image.fromarray(patch.max(axis=2).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)
            correlation = np.corrcoef(np.asarray(strongest).ravel(), all_scans[digit.scan_index].ravel())[0, 1]
            assert correlation >= 0.8
        background = scene.image[outside].astype(np.int64)
        assert np.all(background == background[:, :1])  # grey
        assert background.mean() <= 75
        assert background.std() <= 6


def test_answers_agree_with_an_independent_reading(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(5)
    families: Counter[str] = Counter()
    absent = num_count_colour = 0
    for scene in scenes:
        questions = valid_questions(scene, rng)
        assert len({question.family for question in questions}) == len(questions)
        for question in questions:
            assert (question.answer, question.digit_height_px) == expected_answer(scene, question)
            families[question.family] += 1
            if question.family == "count_colour":
                num_count_colour += 1
                absent += question.answer == "0"
    assert set(families) == set(FAMILIES)
    assert min(families.values()) >= 0.3 * len(scenes)
    assert 0.17 <= absent / num_count_colour <= 0.33


def test_every_valid_family_is_offered(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(6)
    for scene in scenes:
        offered = {question.family for question in valid_questions(scene, rng)}
        heights = sorted(digit.height_px for digit in scene.digits)
        colours = Counter(digit.colour for digit in scene.digits)
        values = Counter(digit.value for digit in scene.digits)
        expected = {"count", "count_colour", "read"}
        expected |= {"digit_of_colour"} if 1 in colours.values() else set()
        expected |= {"colour_of_digit"} if 1 in values.values() else set()
        expected |= {"sum"} if len(heights) in SUM_DIGITS else set()
        if len(heights) > 1 and heights[-1] >= 1.25 * heights[-2]:
            expected |= {"largest", "colour_of_largest"}
        expected |= {"product", "difference"} if list(colours.values()).count(1) >= 2 else set()
        not_last = [digit for digit in scene.digits[:-1] if colours[digit.colour] == 1]
        expected |= {"right_of"} if not_last else set()
        assert offered == expected


def test_examples_do_not_depend_on_access_order_or_length() -> None:
    forwards = [
        (e.image.tobytes(), e.question, e.references, e.example_id, e.metadata) for e in DigitVQA("val", 30, seed=4)
    ]
    other = DigitVQA("val", 50, seed=4)
    for i in reversed(range(30)):
        e = other[i]
        assert (e.image.tobytes(), e.question, e.references, e.example_id, e.metadata) == forwards[i]


def test_seed_split_and_index_all_change_the_example() -> None:
    def image(split: str, seed: int, index: int) -> bytes:
        return DigitVQA(split, 3, seed)[index].image.tobytes()

    images = {image(split, seed, index) for split in SPLITS for seed in (0, 1) for index in range(3)}
    assert len(images) == 3 * 2 * 3


def test_families_are_balanced_and_metadata_is_right() -> None:
    dataset = DigitVQA("train", 1650)
    families: Counter[str] = Counter()
    for i, example in enumerate(dataset):
        families[example.metadata["family"]] += 1
        if i < 200:
            scene, question = dataset.scene_and_question(i)
            answer, height_px = expected_answer(scene, question)
            assert (example.question, example.references) == (question.text, (answer,))
            assert example.image.mode == "RGB"
            assert example.image.tobytes() == scene.image.tobytes()
            assert example.metadata == {
                "family": question.family,
                "num_digits": len(scene.digits),
                "digit_height_px": height_px,
                "canvas": f"{example.image.width}x{example.image.height}",
            }
    assert set(families) == set(FAMILIES)
    # 150 expected per family, standard deviation 11.3
    assert all(abs(n - 150) < 45 for n in families.values())


def test_indexing_follows_sequences() -> None:
    dataset = DigitVQA("test", 5)
    assert len(dataset) == 5
    assert dataset[-1].example_id == dataset[4].example_id == "digits-test-0-4"
    assert [example.example_id for example in dataset[1:3]] == ["digits-test-0-1", "digits-test-0-2"]
    for index in (5, -6):
        with pytest.raises(IndexError):
            dataset[index]


def test_narrow_config_is_honoured() -> None:
    config = SceneConfig(
        min_digits=2, max_digits=3, min_height_px=20, max_height_px=24, canvases=((128, 96), (96, 128))
    )
    for i in range(60):
        scene, _ = DigitVQA("train", 60, config=config).scene_and_question(i)
        assert len(scene.digits) in (2, 3)
        assert all(20 <= digit.height_px <= 24 for digit in scene.digits)
        assert scene.image.shape[:2] in ((96, 128), (128, 96))


def test_families_that_a_config_rules_out_are_not_asked() -> None:
    single = SceneConfig(max_digits=1)
    assert set(single.possible_families) == set(FAMILIES) - {
        "largest",
        "colour_of_largest",
        "sum",
        "right_of",
        "difference",
        "product",
    }
    assert {e.metadata["family"] for e in DigitVQA("train", 80, config=single)} == set(single.possible_families)
    assert "largest" not in SceneConfig(min_height_px=20, max_height_px=24).possible_families
    assert "sum" not in SceneConfig(min_digits=5, max_digits=5).possible_families


def test_canvases_without_allowed_heights_are_left_out() -> None:
    config = SceneConfig(min_height_px=39)
    assert set(config.usable_canvases) == {canvas for canvas in CANVASES if min(canvas) >= 96}
    with pytest.raises(ConfigError, match="no canvas"):
        SceneConfig(min_height_px=39, canvases=((64, 64),))


def test_unknown_split_is_refused() -> None:
    for call in (
        lambda: DigitVQA("dev", 1),
        lambda: sample_scene(np.random.default_rng(0), "dev"),
    ):
        with pytest.raises(DataError, match=r"'dev'.*train, val, test"):
            call()


@pytest.mark.parametrize(("num_examples", "seed"), [(-1, 0), (1, -1)])
def test_negative_sizes_are_refused(num_examples: int, seed: int) -> None:
    with pytest.raises(DataError, match="negative"):
        DigitVQA("train", num_examples, seed)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_digits": 0},
        {"min_digits": 3, "max_digits": 2},
        {"max_digits": 7},
        {"min_height_px": 7},
        {"min_height_px": 30, "max_height_px": 20},
    ],
)
def test_impossible_config_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="need"):
        SceneConfig(**settings)


def test_digits_that_cannot_fit_are_refused() -> None:
    config = SceneConfig(min_digits=6, max_digits=6, min_height_px=38, canvases=((64, 64),))
    with pytest.raises(ConfigError, match="do not fit"):
        sample_scene(np.random.default_rng(0), "train", config)
