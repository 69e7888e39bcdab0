"""Metrics: what an answer earns on one example, between 0 and 1, and optionally what answers to a whole set make."""

from __future__ import annotations

import functools
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pacevlm.data.vqa_accuracy import vqa_accuracy
from pacevlm.errors import ConfigError, DataError
from pacevlm.types import Example

# What scores one answer: the answer, the references, at least one, and the options that the question offers, if any.
Score = Callable[[str, Sequence[str], Sequence[str]], float]
Summary = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        name: what it is called in settings and reports.
        score: of one answer given its references and options, 0 to 1.
        summary: numbers of a whole set, given its answers and their references; None if their mean score says it all.
        needs_choices: whether every example has to offer options, and every reference to be one of them.
    """

    name: str
    score: Score
    summary: Summary | None = None
    needs_choices: bool = False

    def of(self, example: Example) -> Metric:
        """What scores an example: its own metric if it names one, else this."""
        return self if example.metric is None else load_metric(example.metric)

    def __call__(self, answer: str, example: Example) -> float:
        """What an answer to an example earns, 0 to 1; raises DataError if the score is no such number."""
        metric = self.of(example)
        score = float(metric.score(answer, example.references, example.choices))
        if not 0.0 <= score <= 1.0:
            raise DataError(f"the metric {metric.name} gave {score} to {answer!r}; a score lies between 0 and 1")
        return score

    def check(self, example: Example) -> None:
        """Raise DataError if the example cannot be scored by this metric, or by its own."""
        metric = self.of(example)
        if not metric.needs_choices:
            return
        where = example.where or f"example {example.example_id!r}"
        if len(example.choices) < 2:
            raise DataError(f"{where}: the metric {metric.name} needs 'choices', a list of at least two options")
        for reference in example.references:
            if _option(reference, example.choices) is None:
                raise DataError(
                    f"{where}: the answer {reference!r} is neither one of the options {list(example.choices)} nor the "
                    "letter of one"
                )


def load_metric(name: str) -> Metric:
    """The metric of a name; raises ConfigError with the known ones."""
    if name not in METRICS:
        raise ConfigError(f"there is no metric {name!r}; use one of {', '.join(METRICS)}")
    return METRICS[name]


def common_metric(metrics: Iterable[Metric]) -> Metric:
    """The metric of examples that name their own; its name joins theirs if they are several."""
    by_name = {metric.name: metric for metric in metrics}
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    return Metric("+".join(sorted(by_name)), _exact_match)


def normalise_answer(text: str) -> str:
    """Strip, lower-case and collapse whitespace, and compose accents: `" Light  Blue "` equals `"light blue"`."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _exact_match(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 when the answer is one of the references after `normalise_answer`."""
    return float(normalise_answer(answer) in map(normalise_answer, references))


# Relaxed accuracy ----------------------------------------------------------------------------------------------------


def _relaxed_accuracy(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 for a number within 5 % of a reference, or for the same text but for its case.

    `50%` is 0.5, and `1,000` is 1000. Of a reference that is 0 only 0 is within 5 %.

    Source: Masry et al., "ChartQA", 2022, section 5.1, after Methani et al., "PlotQA", 2020.
    """
    return float(any(_is_close(answer.strip(), reference.strip()) for reference in references))


def _is_close(answer: str, reference: str) -> bool:
    if answer.lower() == reference.lower():
        return True
    number, target = _parse_number(answer), _parse_number(reference)
    if number is None or target is None:
        return False
    # A hair more, because 5 % of most numbers is no binary fraction.
    return abs(number - target) <= RELAXED_TOLERANCE * abs(target) * (1 + 1e-9)


def _parse_number(text: str) -> float | None:
    digits = text.removesuffix("%").rstrip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    try:
        value = float(digits)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value


# ANLS ----------------------------------------------------------------------------------------------------------------


def _anls(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference; 0 where half of the text or more is wrong.

    Source: Biten et al., "Scene Text Visual Question Answering", 2019, equation 1 with a threshold of 0.5; case and
    repeated spaces do not count, as in the evaluation of DocVQA.
    """
    given = normalise_answer(answer)
    return max(_similarity(given, normalise_answer(reference)) for reference in references)


@functools.lru_cache(maxsize=1 << 16)
def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    if a == b:
        return 1.0
    if abs(len(a) - len(b)) >= ANLS_THRESHOLD * longest:  # the distance is no less
        return 0.0
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    distance = row[-1] / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


# Multiple choice -----------------------------------------------------------------------------------------------------


def _multiple_choice(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 when the answer names an option that a reference names, each by its letter or its text.

    `B`, `(b)`, `b.`, `B) the dog` and `the dog` name the second of two options; a letter with any other text behind it
    names none, so that an answer that lists several letters earns nothing.
    """
    option = _option(answer, choices)
    return float(option is not None and any(_option(reference, choices) == option for reference in references))


def _option(text: str, choices: Sequence[str]) -> int | None:
    """Place of the option that a text names, or None; the text of an option comes before the letter of another."""
    given, options = _bare(text), [_bare(choice) for choice in choices]
    if given in options:
        return options.index(given)
    match = re.fullmatch(r"\(?([a-z])(?:[).:]+ ?(.*))?", given)
    if match is None:
        return None
    place, rest = string.ascii_lowercase.index(match[1]), match[2]
    return place if place < len(options) and (not rest or rest == options[place]) else None


def _bare(text: str) -> str:
    return normalise_answer(text).removesuffix(".").rstrip()


# F1 ------------------------------------------------------------------------------------------------------------------


def _f1(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """F1 of the words shared with the nearest reference, without articles and punctuation.

    Source: Rajpurkar et al., "SQuAD", 2016, section 6.1.
    """
    return max(_shared_words(_words(answer), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _shared_words(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def _f1_summary(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's two numbers, both 0 to 1: the share of answers with the words of a reference, and the mean F1."""
    pairs = list(zip(answers, references, strict=True))
    exact = [any(_words(answer) == _words(reference) for reference in own) for answer, own in pairs]
    return {
        "exact_match": sum(exact) / len(pairs),
        "f1": math.fsum(_f1(answer, own, ()) for answer, own in pairs) / len(pairs),
    }


# Yes or no -----------------------------------------------------------------------------------------------------------


def _yes_no(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 when answer and reference both say yes or both say no; an answer that says neither earns nothing.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", 2023; how an answer is read is
    that of its evaluation script (github.com/RUCAIBox/POPE, `evaluate.py`), but that it takes what says neither for a
    yes, which would pay half of the points for answers to anything else.
    """
    said = _says_yes(answer)
    return float(said is not None and any(_says_yes(reference) is said for reference in references))


def _says_yes(text: str) -> bool | None:
    """Whether the first sentence says yes; None where it says neither that nor what the script takes for a no."""
    words = text.partition(".")[0].replace(",", "").split()
    if not {"No", "not", "no"}.isdisjoint(words):
        return False
    return True if "yes" in (word.lower() for word in words) else None


def _yes_no_summary(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """POPE's numbers of a whole set, 0 to 1: precision, recall and F1 of yes, and the share of answers that say it."""
    said = [_says_yes(answer) is True for answer in answers]
    true = [_says_yes(own[0]) is True for own in references]
    hits, num_said, num_true = sum(map(min, said, true)), sum(said), sum(true)
    return {
        "precision": hits / num_said if num_said else 0.0,
        "recall": hits / num_true if num_true else 0.0,
        "f1": 2 * hits / (num_said + num_true) if num_said + num_true else 0.0,
        "yes_ratio": num_said / len(said),
    }


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", _exact_match),
        Metric("vqa", vqa_accuracy),
        Metric("relaxed", _relaxed_accuracy),
        Metric("anls", _anls),
        Metric("multiple_choice", _multiple_choice, needs_choices=True),
        Metric("f1", _f1, _f1_summary),
        Metric("yes_no", _yes_no, _yes_no_summary),
    )
}
