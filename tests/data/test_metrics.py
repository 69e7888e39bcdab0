"""Metrics give what their published definitions give; the source of every stored case is named."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pytest
from PIL import Image

from pacevlm.config import MetricName
from pacevlm.data.metrics import METRICS, Metric, common_metric, load_metric, normalise_answer
from pacevlm.data.vqa_accuracy import normalise_vqa, vqa_accuracy
from pacevlm.errors import ConfigError, DataError
from pacevlm.types import Example


def score(name: str, answer: str, references: Sequence[str] | str, choices: Sequence[str] = ()) -> float:
    references = (references,) if isinstance(references, str) else tuple(references)
    metadata = {"choices": list(choices)} if choices else {}
    return load_metric(name)(answer, Example("x", Image.new("RGB", (1, 1)), "?", references, metadata))


# All metrics ---------------------------------------------------------------------------------------------------------


def test_every_metric_has_its_name_in_the_settings() -> None:
    assert tuple(METRICS) == typing.get_args(MetricName)
    assert all(METRICS[name].name == name for name in METRICS)
    with pytest.raises(ConfigError, match=r"no metric 'bleu'; use one of exact_match, vqa, .*f1"):
        load_metric("bleu")


ODD = [
    "",
    " ",
    "yes",
    "YES.",
    "1,000",
    "-5",
    "50%",
    "0",
    "0.0",
    "nan",
    "inf",
    "1e400",
    "%",
    "٣",
    "Ünï",
    "a\x00b",
    "🙂" * 50,
]


@pytest.mark.parametrize("name", METRICS)
def test_a_score_is_a_reward_and_a_reference_is_right(name: str) -> None:
    for answer in ODD:
        for reference in ODD:
            assert 0.0 <= score(name, answer, (reference,), ("yes", "0")) <= 1.0
            # One more way of being right takes nothing away, but where people vote.
            if name != "vqa":
                both = score(name, answer, (reference, "other"), ("yes", "0"))
                assert both >= score(name, answer, (reference,), ("yes", "0"))
        if name not in ("multiple_choice", "yes_no"):
            assert score(name, answer, (answer,)) == 1.0


def test_a_score_outside_its_range_is_an_error() -> None:
    for value in (1.5, -0.1, float("nan")):
        metric = Metric("mine", lambda answer, references, choices, value=value: value)
        with pytest.raises(DataError, match="mine gave"):
            metric("a", Example("x", Image.new("RGB", (1, 1)), "?", ("a",)))


# Exact match ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        *[("7", "7"), (" 7\n", "7"), ("Red", "red"), ("4  7\t1", "4 7 1"), ("LIGHT Blue", " light\nblue ")],
        *[("", " "), ("CAFÉ", "cafe\u0301")],
    ],
)
def test_same_text_matches_in_both_directions(prediction: str, reference: str) -> None:
    assert score("exact_match", prediction, reference) == score("exact_match", reference, prediction) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"), [("7", "1"), ("471", "4 7 1"), ("red.", "red"), ("", "0"), ("1,000", "1000")]
)
def test_other_text_does_not_match(prediction: str, reference: str) -> None:
    assert score("exact_match", prediction, reference) == score("exact_match", reference, prediction) == 0.0


def test_any_of_several_references_matches() -> None:
    assert score("exact_match", "Grey", ("gray", "grey")) == 1.0
    assert score("exact_match", "green", ("gray", "grey")) == 0.0


def test_normalisation_is_idempotent() -> None:
    once = normalise_answer("  A \n B\t c ")
    assert once == "a b c"
    assert normalise_answer(once) == once


# VQA accuracy --------------------------------------------------------------------------------------------------------


# What processPunctuation and processDigitArticle of the official script make of a text
# (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at a013f00).
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("Yes.", "yes"), ("the  Dog", "dog"), ("two", "2"), ("none", "0"), ("ten-speed", "10 speed"), ("A", "")],
        *[("1,000", "1000"), ("1,000 dogs!", "1000 dogs"), ("3.5", "3.5"), ("5.", "5"), (".5", ".5"), ("50%", "50%")],
        *[("dont", "don't"), ("couldn'tve", "couldn't've"), ("couldntve", "couldntve"), ("somebody'd", "somebodyd")],
        *[("twas", "'twas"), ("y'allll", "y'all'll"), ("Im", "im"), ("lets", "lets"), ("it's", "it's")],
        *[("black/white", "black white"), ("black / white", "black white"), ("red-blue", "red blue"), ("(b)", "b")],
        *[("12:30", "12:30"), ("a.m.", "am"), ("$5", "$5"), ("what?!", "what"), ("new\nyork", "new york")],
        *[("Été", "été"), ("٣.", "٣"), ("", "")],
    ],
)
def test_vqa_normalisation_is_the_official_one(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


# Scores that the same script gives with ten answers of people.
@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("yes", ["yes"] * 1 + ["no"] * 9, 0.3),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("Yes.", ["yes"] * 4 + ["no"] * 6, 1.0),
        ("2", ["two"] * 3 + ["2"] * 2 + ["3"] * 5, 1.0),
        ("", ["yes"] * 9 + ["no"], 0.0),
        ("maybe", ["yes"] * 9 + ["no"], 0.0),
        ("the dont walk sign", ["don't walk sign"] * 5 + ["stop sign"] * 5, 1.0),
        ("1000", ["1,000"] * 6 + ["2,000"] * 4, 1.0),
    ],
)
def test_vqa_accuracy_is_the_official_one(answer: str, references: list[str], expected: float) -> None:
    assert score("vqa", answer, references) == pytest.approx(expected)
    assert score("vqa", answer, references[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["yes"], 1.0),
        (["no"], 0.0),
        (["yes", "yes"], 1.0),
        (["yes", "no"], 0.5),
        (["yes", "yes", "yes"], 1.0),
        (["yes", "yes", "no"], 2 / 3),  # each other one counts a half
        (["yes"] * 4, 1.0),
        (["Yes."] * 10, 1.0),  # also where all agree
    ],
)
def test_vqa_accuracy_with_fewer_references_asks_all_others(references: list[str], expected: float) -> None:
    assert vqa_accuracy("yes", references) == pytest.approx(expected)


# Relaxed accuracy ----------------------------------------------------------------------------------------------------


# Stored cases of an implementation by ChartQA's definition (github.com/google-research/pix2struct, metrics_test.py:
# five of these eight are right), and others that the definition decides (Masry et al. 2022, section 5.1).
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        *[("abc", "abc", 1), ("abc", "Abc", 1), ("Abc", "abc", 1), ("100%", "96%", 1), ("100%", "94%", 0)],
        *[("100%", "0.96", 1), ("100%", "0.94", 0), ("Don't", "Won't", 0)],
        *[
            ("105", "100", 1),
            ("95", "100", 1),
            ("105.1", "100", 0),
            ("0.95", "1", 1),
            ("1.05", "1", 1),
            ("0.94", "1", 0),
        ],
        *[("-105", "-100", 1), ("-100", "100", 0), ("0", "0", 1), ("0.0", "0", 1), ("0.001", "0", 0)],
        *[("50%", "0.5", 1), ("0.5", "50%", 1), ("50 %", "0.5", 1), ("50%", "50", 0), ("1,000", "1000", 1)],
        *[
            ("1000", "1,040", 1),
            ("1,00", "100", 0),
            ("1e3", "1000", 1),
            (" 7 ", "7", 1),
            ("7.", "7", 1),
            ("\u0667", "7", 1),
        ],
        *[("nan", "nan", 1), ("nan", "5", 0), ("inf", "5", 0), ("inf", "inf", 1), ("1e400", "5", 0), ("", "5", 0)],
        *[("five", "5", 0), ("yes.", "yes", 0), ("%", "0", 0)],
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, expected: float) -> None:
    assert score("relaxed", answer, reference) == expected


# ANLS ----------------------------------------------------------------------------------------------------------------


# The first three: github.com/google-research/pix2struct, metrics_test.py. The others follow from equation 1 of Biten et
# al. 2019: 1 - distance / longest text where that distance is below a half, else 0.
@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        (("abc"), ["Abc"], 1.0),
        ("100%", ["0.96"], 0.0),
        ("Don't", ["Won't"], 0.8),
        ("12/15/89", ["12/15/88"], 0.875),
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
        ("Dear dr. Lobo", ["Dr. Lobo"], 1 - 5 / 13),
        ("ab", ["ax"], 0.0),  # exactly a half
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("sitting", ["kitten"], 1 - 3 / 7),
        (" Two  Words ", ["two words"], 1.0),
        ("twowords", ["two words"], 8 / 9),
        ("", ["yes"], 0.0),
        ("", [""], 1.0),
        ("日本語", ["日本誤"], 2 / 3),
        ("yes.", ["yes"], 0.75),
    ],
)
def test_anls(answer: str, references: list[str], expected: float) -> None:
    assert score("anls", answer, references) == pytest.approx(expected)


# Multiple choice -----------------------------------------------------------------------------------------------------

OPTIONS = ("a cat", "the dog", "B", "None of these.")


@pytest.mark.parametrize("reference", ["B.", "b)", "the dog", "(B)"])
@pytest.mark.parametrize("answer", ["(b)", "b.", "B)", "b: the dog", "THE  DOG", "(B) the dog.", "the dog."])
def test_an_option_is_named_by_letter_or_text(answer: str, reference: str) -> None:
    assert score("multiple_choice", answer, reference, ("a cat", "the dog", "None.")) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        *[("A", "a cat", 1), ("a", "a cat", 1), ("D", "none of these", 1), ("C", "B", 1)],
        ("B", "the dog", 0),  # the text of an option comes before a letter
        *[
            ("E", "a cat", 0),
            ("", "a cat", 0),
            ("A. B. C. D.", "a cat", 0),
            ("A or B", "a cat", 0),
            ("cat", "a cat", 0),
        ],
        *[("A) the dog", "a cat", 0), ("A) the dog", "the dog", 0), ("ä", "a cat", 0)],
    ],
)
def test_options_are_told_apart(answer: str, reference: str, expected: float) -> None:
    assert score("multiple_choice", answer, reference, OPTIONS) == expected


def test_examples_that_multiple_choice_cannot_score_are_refused() -> None:
    metric, image = METRICS["multiple_choice"], Image.new("RGB", (1, 1))
    for metadata in ({}, {"choices": ["one"]}):
        with pytest.raises(DataError, match=r"line 3: .*'choices', a list of at least two"):
            metric.check(Example("x", image, "?", ("a",), metadata, where="f.jsonl, line 3"))
    with pytest.raises(DataError, match="'dog' is neither one of the options"):
        metric.check(Example("x", image, "?", ("a", "dog"), {"choices": ["cat", "cow"]}))
    metric.check(Example("x", image, "?", ("a", "cow"), {"choices": ["cat", "cow"]}))
    METRICS["vqa"].check(Example("x", image, "?", ("a",)))


# Yes or no -----------------------------------------------------------------------------------------------------------


# What POPE's script reads in an answer (github.com/RUCAIBox/POPE, evaluate.py): the first sentence without commas is a
# no if one of its words is No, no or not. Where the script says yes to what holds neither, here it is no answer.
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *[("yes", "yes"), ("Yes", "yes"), ("Yes.", "yes"), ("Yes, there is a dog in the image.", "yes")],
        *[("no", "no"), ("No", "no"), ("No, there is no dog.", "no"), ("There is not a dog in the image.", "no")],
        *[("Yes. There is no cat.", "yes"), ("yes, not one", "no"), ("no\n", "no"), ("Nothing, yes", "yes")],
        *[("", None), ("dog", None), (".", None), ("nothing", None), ("NO", None), ("2", None)],
    ],
)
def test_yes_and_no_are_read_as_by_popes_script(answer: str, said: str | None) -> None:
    assert [score("yes_no", answer, label) for label in ("yes", "no")] == [float(said == "yes"), float(said == "no")]


def test_popes_numbers_of_a_whole_set() -> None:
    summary = METRICS["yes_no"].summary
    assert summary is not None
    answers = ["yes", "Yes.", "yes", "no", "No", "2", "no"]
    labels = [("yes",), ("yes",), ("no",), ("no",), ("yes",), ("yes",), ("no",)]
    # Two of three yeses are right, and two of the four that should be yes were.
    assert summary(answers, labels) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 4, "f1": 2 * 2 / (3 + 4), "yes_ratio": 3 / 7}
    )
    assert summary(["no"], [("no",)]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


# Each example's own --------------------------------------------------------------------------------------------------


def test_an_example_is_scored_by_its_own_metric() -> None:
    image = Image.new("RGB", (1, 1))
    asked, other = METRICS["exact_match"], METRICS["anls"]
    own = Example("x", image, "?", ("kitten",), metric="anls")
    plain = Example("x", image, "?", ("kitten",))
    assert asked("sitting", own) == pytest.approx(1 - 3 / 7)
    assert asked("sitting", plain) == 0.0
    assert common_metric([other, other]) is other
    mixed = common_metric([other, asked])
    assert mixed.name == "anls+exact_match"
    assert [mixed("sitting", example) for example in (own, plain)] == [pytest.approx(1 - 3 / 7), 0.0]
    with pytest.raises(DataError, match="the metric multiple_choice needs 'choices'"):
        mixed.check(Example("x", image, "?", ("a",), metric="multiple_choice"))


# F1 ------------------------------------------------------------------------------------------------------------------


# By the definition of SQuAD's evaluation (Rajpurkar et al. 2016, section 6.1): 2 PR / (P + R) over words.
@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("the red car", ["a red car!"], 1.0),
        ("red car", ["red"], 2 / 3),
        ("red red", ["red"], 2 / 3),
        ("blue", ["red", "dark blue"], 2 / 3),
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),
        ("1,000", ["1000"], 1.0),
    ],
)
def test_f1(answer: str, references: list[str], expected: float) -> None:
    assert score("f1", answer, references) == pytest.approx(expected)


def test_the_summary_of_a_set_is_squads() -> None:
    summary = METRICS["f1"].summary
    assert summary is not None
    references = [["a red car!"], ["red"], ["green"]]
    assert summary(["the red car", "red car", "blue"], references) == pytest.approx(
        {"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3}
    )
