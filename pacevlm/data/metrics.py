"""Accuracy of one answer."""

from __future__ import annotations


def normalise_answer(text: str) -> str:
    """Strip, lower-case and collapse whitespace, so that `" Light  Blue "` equals `"light blue"`."""
    return " ".join(text.lower().split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when prediction and reference are the same text after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(reference))
