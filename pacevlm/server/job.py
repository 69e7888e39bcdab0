"""What a client asks of the server, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pacevlm.knobs import Knobs
from pacevlm.types import Answer, BudgetKind


@dataclass(frozen=True)
class Job:
    """One request as it arrived.

    Attributes:
        request_id: names it in logs.
        image: the picture's file as sent; None for a question alone.
        question: the user's text.
        budgets_ms: by what they cover; where both kinds are given both must hold. Empty: the server's default budget.
        price: what time is worth below the budget, at least; the bundle's default if None. Under load it is worth more.
        knobs: what must run, whatever the policy would choose.
        max_new_tokens: most tokens of the answer; the model's own limit if None, or if that is lower.
        arrived_s: `time.perf_counter()` when its first byte was seen; budgets count from here.
        stream: whether pieces of the answer are wanted as they are decoded.
    """

    request_id: str
    image: bytes | None
    question: str
    arrived_s: float
    budgets_ms: Mapping[BudgetKind, float]
    price: float | None = None
    knobs: Knobs | None = None
    max_new_tokens: int | None = None
    stream: bool = False


@dataclass(frozen=True)
class Served:
    """A request that was answered.

    Attributes:
        answer: `waited_ms` is all that was gone of the budget when it began.
        queue_ms: from its arrival until the worker began.
        finished_s: `time.perf_counter()` when the worker had the answer.
        attempts: how many workers began it; 2 if the first one died.
        finish_reason: `length` if the answer was cut at its most tokens, else `stop`.
    """

    answer: Answer
    queue_ms: float
    finished_s: float
    attempts: int
    finish_reason: Literal["stop", "length"]
