"""Tasks and mixtures: what they ask, how often, and that the traffic of before is what it was."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pacevlm.config import DataConfig, ImportanceConfig
from pacevlm.data.digit_tasks import TASKS, DigitTaskVQA, load_digits
from pacevlm.data.digits import FAMILIES, SPLITS, DigitVQA, valid_questions
from pacevlm.data.elements import ELEMENT_FAMILIES, ELEMENTS
from pacevlm.data.splits import load_splits
from pacevlm.errors import ConfigError, DataError
from pacevlm.mixture import MIXTURES, parse_mixture
from pacevlm.mixture import TASKS as TASK_NAMES
from pacevlm.types import Example


def facts(example: Example) -> tuple[Any, ...]:
    return example.image.tobytes(), example.question, example.references, example.example_id, example.metadata


def test_uniform_traffic_is_what_it_was_before_there_were_tasks() -> None:
    """Words are pinned; pixels, which a library's resizing decides, are compared with the plain data set."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for plain, mixed in zip(DigitVQA(split, 40, 3), load_digits(split, 40, "uniform", 3), strict=True):
            assert facts(plain) == facts(mixed)
            words = [mixed.example_id, mixed.question, mixed.references, mixed.metadata]
            digest.update(json.dumps(words).encode())
    assert digest.hexdigest() == "78894d063f4cb94fab0963ecc6f9963c8867e8d5083c52ef3af1e3bae41bb63d"


def test_a_part_of_uniform_traffic_is_known_by_the_name_it_had() -> None:
    splits = load_splits(DataConfig(mixture="uniform", num_train=4, num_val=3, num_test=2, seed=5))
    assert splits.identity["test"] == {"dataset": "digits", "seed": 5, "first": 0, "num_examples": 2}


def test_the_mixture_tells_parts_apart() -> None:
    def identity(mixture: str | None) -> dict[str, dict[str, Any]]:
        return load_splits(DataConfig(mixture=mixture, num_train=4, num_val=3, num_test=2)).identity

    mixtures = ("uniform", "crossed", "detail=1", "detail=1,thought=2", "detail=2,thought=1")
    identities = [identity(mixture) for mixture in mixtures]
    for part in ("train", "val", "test"):
        assert len({json.dumps(facts[part]) for facts in identities}) == len(mixtures)
    assert identity("thought=2, detail=1.0") == identity("detail=1,thought=2")  # one mixture in two spellings
    assert identity("detail=1,thought=1,overview=1,knowledge=1") == identity("crossed") == identity(None)


@pytest.mark.parametrize("mixture", [*MIXTURES, "detail=1", "thought=0.5,detail=2"])
def test_what_was_measured_says_the_mixture(mixture: str) -> None:
    """Results, reports, headroom and block orders name the data set so."""
    splits = load_splits(DataConfig(mixture=mixture, num_train=2, num_val=2, num_test=2))
    mixed = parse_mixture(mixture)
    assert splits.name == (f"digits-{mixed.name}" if mixed.weights else "digits")
    for part in ("train", "val", "test"):
        assert getattr(splits, part)[1].example_id == f"{splits.name}-{part}-0-1"


def test_the_names_in_settings_are_those_of_the_data_set() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert all(task.name == name for name, task in TASKS.items())
    for task in TASKS.values():
        known = ELEMENT_FAMILIES if task.name == "knowledge" else task.scenes.possible_families
        assert set(task.families) <= set(known)
    assert not set(ELEMENT_FAMILIES) & set(FAMILIES)


def test_sizes_tell_no_task_from_another() -> None:
    """Else a table that goes by the size of the picture would know the task."""
    assert len({task.scenes.usable_canvases for task in TASKS.values()}) == 1
    sizes: dict[str, Counter[str]] = {name: Counter() for name in TASKS}
    for example in load_digits("train", 1200, "crossed"):
        sizes[example.metadata["task"]][example.metadata["canvas"]] += 1
    together = sum(sizes.values(), Counter[str]())
    for found in sizes.values():
        for canvas, number in together.items():
            expected = found.total() * number / together.total()
            assert abs(found[canvas] - expected) < 4 * expected**0.5, (found, canvas)


def test_examples_do_not_depend_on_access_order_or_length() -> None:
    forwards = [facts(example) for example in DigitTaskVQA("val", 30, "crossed", seed=4)]
    other = DigitTaskVQA("val", 50, "crossed", seed=4)
    for i in reversed(range(30)):
        assert facts(other[i]) == forwards[i]


def test_seed_split_index_and_mixture_all_change_the_example() -> None:
    sources = [
        DigitTaskVQA(split, 3, mixture, seed)
        for split in SPLITS
        for seed in (0, 1)
        for mixture in ("detail=1", "thought=1")
    ]
    examples = [example for source in sources for example in source]
    assert len({example.image.tobytes() for example in examples}) == len(examples)
    assert len({example.example_id for example in examples}) == len(examples)


def test_ids_name_the_mixture() -> None:
    assert load_digits("test", 5, "crossed", 2)[-1].example_id == "digits-crossed-test-2-4"
    assert load_digits("test", 5, "thought=2,detail=0.5")[3].example_id == "digits-detail=0.5,thought=2-test-0-3"
    assert load_digits("test", 5, "uniform")[3].example_id == "digits-test-0-3"


@pytest.mark.parametrize("mixture", ["crossed", "detail=1,knowledge=3", "overview=2.5,thought=7.5"])
def test_tasks_are_asked_as_their_weights_say(mixture: str) -> None:
    number = 1200
    tasks: Counter[str] = Counter()
    families: Counter[tuple[str, str]] = Counter()
    data = DigitTaskVQA("train", number, mixture)
    for i in range(number):
        task, rng = data._task_and_rng(i)
        family = task.families[rng.integers(len(task.families))]
        tasks[task.name] += 1
        families[task.name, family] += 1
        if i < 20:
            assert (data[i].metadata["task"], data[i].metadata["family"]) == (task.name, family)
    weights = parse_mixture(mixture).weights
    assert set(tasks) == set(weights)
    for name, weight in weights.items():
        expected = number * weight / sum(weights.values())
        assert abs(tasks[name] - expected) < 5 * expected**0.5
        for family in TASKS[name].families:
            each = tasks[name] / len(TASKS[name].families)
            assert abs(families[name, family] - each) < 5 * each**0.5


def test_answers_are_read_off_the_scene() -> None:
    data = DigitTaskVQA("test", 200, "crossed", seed=1)
    for i, example in enumerate(data):
        scene, question = data.scene_and_question(i)
        task = TASKS[example.metadata["task"]]
        assert example.metadata == {
            "family": question.family,
            "num_digits": len(scene.digits),
            "digit_height_px": question.digit_height_px,
            "canvas": f"{example.image.width}x{example.image.height}",
            "task": task.name,
        }
        assert (example.question, example.references) == (question.text, (question.answer,))
        assert question.family in task.families
        assert task.scenes.min_digits <= len(scene.digits) <= task.scenes.max_digits
        heights = [digit.height_px for digit in scene.digits]
        assert task.scenes.min_height_px <= min(heights) <= max(heights) <= task.scenes.max_height_px
        if question.family in ELEMENT_FAMILIES:
            number = int("".join(str(digit.value) for digit in sorted(scene.digits, key=lambda digit: digit.box[0])))
            fact = ELEMENTS[number - 1]
            assert question.answer == (fact.name if "Which element" in question.text else fact.symbol)
        else:  # `test_digits.py` checks these answers against a reading of its own
            asked = [valid_questions(scene, np.random.default_rng(seed)) for seed in range(40)]
            assert (question.text, question.answer) in {(q.text, q.answer) for some in asked for q in some}


@pytest.mark.parametrize(
    "mixture",
    [
        *("", "even", "detail", "detail=0", "detail=-1", "detail=nan", "detail=1e9", "detail=" + "9" * 400, 5),
        *("detail=1,detail=2", "detail=1,x=2", "detail=1;thought=1", "detail==1", "uniform,crossed", "detail=1,"),
    ],
)
def test_an_unknown_mixture_is_refused_with_what_is_allowed(mixture: Any) -> None:
    for call in (
        lambda: DataConfig(mixture=mixture),
        lambda: ImportanceConfig(mixture=mixture),
        lambda: parse_mixture(mixture),
    ):
        with pytest.raises(ConfigError, match=r"uniform, crossed, or weights above 0.*detail, thought, overview, know"):
            call()


def test_files_have_no_mixture() -> None:
    assert DataConfig("data.jsonl").mixture is None
    for mixture in MIXTURES:
        for kind in (DataConfig, ImportanceConfig):
            with pytest.raises(ConfigError, match=r"dataset is 'data.jsonl'.*leave mixture out"):
                kind(dataset="data.jsonl", mixture=mixture)


def test_a_mixture_without_tasks_and_bad_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="'uniform' has no tasks"):
        DigitTaskVQA("train", 1, "uniform")
    with pytest.raises(DataError, match="no split 'dev'"):
        load_digits("dev", 1, "crossed")
    with pytest.raises(DataError, match="negative"):
        load_digits("train", 1, "crossed", -1)
