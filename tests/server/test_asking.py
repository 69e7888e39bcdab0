"""A job says what its request and its headers said: question, picture and the tightest budgets."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from pacevlm.errors import PacevlmError, QuestionError
from pacevlm.knobs import Knobs
from pacevlm.server.asking import MAX_TOKEN_LENGTH, read_job
from pacevlm.server.job import Job
from pacevlm.server.protocol import FieldError, parse_chat
from pacevlm.server.remote import PictureFetcher


def read(messages: Any, headers: dict[str, str] | None = None, **fields: Any) -> Job:
    asked = parse_chat(json.dumps({"messages": messages, **fields}).encode())
    fetcher = PictureFetcher((), 1000)
    job = read_job(asked, headers or {}, fetcher, max_positions=100, request_id="a", arrived_s=1.0)
    return asyncio.run(job)


def user(content: Any = "Which?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def picture(url: str) -> list[dict[str, Any]]:
    return user([{"type": "text", "text": "Which?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}])


@pytest.mark.parametrize(
    ("headers", "fields", "budgets"),
    [
        ({}, {}, {}),
        ({}, {"latency_budget_ms": 50}, {"e2e": 50}),
        ({}, {"latency_budget_ms": 50, "budget_kind": "ttft"}, {"ttft": 50}),
        ({"request-timeout-ms": "40"}, {"latency_budget_ms": 50}, {"e2e": 40}),
        ({"request-timeout-ms": "60.5"}, {"latency_budget_ms": 50}, {"e2e": 50}),
        ({"x-slo-ttft-ms": "20"}, {"latency_budget_ms": 50}, {"e2e": 50, "ttft": 20}),
        ({"x-slo-ttft-ms": "20", "request-timeout-ms": "80"}, {}, {"e2e": 80, "ttft": 20}),
        ({"x-slo-ttft-ms": "20"}, {"latency_budget_ms": 10, "budget_kind": "ttft"}, {"ttft": 10}),
    ],
)
def test_the_tightest_of_a_kind_binds_and_both_kinds_count(
    headers: dict[str, str], fields: dict[str, Any], budgets: dict[str, float]
) -> None:
    assert read(user(), headers, **fields).budgets_ms == budgets


@pytest.mark.parametrize("name", ["request-timeout-ms", "x-slo-ttft-ms"])
@pytest.mark.parametrize("value", ["0", "-1", "", "nan", "inf", "1e400", "abc", "1_0", "9" * 40, "٣", "5ms", "4e6"])
def test_a_header_that_is_no_time_left_is_refused(name: str, value: str) -> None:
    with pytest.raises(FieldError, match=name) as caught:
        read(user(), {name: value})
    assert caught.value.code == "invalid_budget"


def test_a_kind_without_a_budget_is_refused() -> None:
    with pytest.raises(FieldError, match="budget_kind"):
        read(user(), budget_kind="ttft")


def test_system_messages_stand_in_front_of_the_question() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "In digits."}]},
        *user([{"type": "text", "text": "How"}, {"type": "text", "text": "many?"}]),
    ]
    assert read(messages).question == "Be brief.\nIn digits.\nHow\nmany?"


@pytest.mark.parametrize(
    "others", [user(), [{"role": "assistant", "content": "2"}], [{"role": "tool", "content": "2"}]]
)
def test_conversations_are_refused(others: list[dict[str, Any]]) -> None:
    for messages in (user() + others, others + user()):
        with pytest.raises(FieldError, match="no conversation"):
            read(messages)
    with pytest.raises(FieldError, match="0 turns"):
        read([{"role": "system", "content": "Be brief."}])


def test_a_picture_is_what_was_sent() -> None:
    content = bytes(range(256))
    job = read(picture("data:image/png;base64," + base64.b64encode(content).decode()))
    assert (job.image, job.question) == (content, "Which?")


@pytest.mark.parametrize(
    "url",
    [
        *("data:,x", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,***", "DATA:x;base64,a b"),
        *("data:image/png;base64,ab\x00c", 'data:image/png;base64,ab"c', "data:image/png;base64,ab\\u0041"),
        *("", "x", "http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd", "//example.org/a"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(url: str) -> None:
    with pytest.raises(PacevlmError, match="image_url"):
        read(picture(url))


def test_more_than_one_picture_is_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:;base64,QQ=="}}
    with pytest.raises(FieldError, match="at most one picture"):
        read(user([part, part]))
    with pytest.raises(FieldError, match="at most one picture"):
        read([{"role": "system", "content": [part]}, *user()])


def test_forced_knobs_price_and_tokens_reach_the_job() -> None:
    job = read(user(), knobs="low/4/12", price=5, max_tokens=3, stream=True)
    assert (job.knobs, job.price, job.max_new_tokens, job.stream) == (Knobs("low", 4, 12), 5.0, 3, True)
    for fields, name in (({"knobs": "low"}, "knobs"), ({"price": -1}, "price"), ({"price": 1e9}, "price")):
        with pytest.raises(FieldError) as caught:
            read(user(), **fields)
        assert caught.value.param == name


def test_a_question_that_cannot_fit_is_not_cut_into_tokens() -> None:
    read(user("x" * MAX_TOKEN_LENGTH * 100))
    with pytest.raises(QuestionError, match="801 characters"):
        read(user("x" * (MAX_TOKEN_LENGTH * 100 + 1)))
