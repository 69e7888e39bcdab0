"""Requests are read as they are meant, or refused in one sentence that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pacevlm.server.protocol import FieldError, parse_chat

MESSAGES = [{"role": "user", "content": "Which?"}]


def parse(**fields: Any) -> Any:
    return parse_chat(json.dumps({"messages": MESSAGES, **fields}).encode())


def test_what_changes_nothing_is_passed_over() -> None:
    asked = parse(seed=7, top_p=0.5, user="me", metadata={"a": [1]}, store=True, nonsense={"deep": [[]]}, model="m")
    assert asked.model == "m"
    assert asked.messages[0].content == "Which?"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "n": 1, "tools": [], "logprobs": False, "stop": [], "tool_choice": "none"},
        {"temperature": 0.0, "response_format": {"type": "text"}, "modalities": ["text"], "presence_penalty": 0},
        {"temperature": None, "n": None, "tools": None, "logit_bias": {}, "top_logprobs": 0},
    ],
)
def test_what_asks_for_the_usual_is_allowed(fields: dict[str, Any]) -> None:
    parse(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", 0.7), ("temperature", -1), ("n", 2), ("n", 0), ("tools", [{}]), ("functions", [{}])),
        *(("logprobs", True), ("top_logprobs", 3), ("logit_bias", {"1": 5}), ("frequency_penalty", 0.1)),
        *(("response_format", {"type": "json_object"}), ("stop", "x"), ("modalities", ["audio"]), ("audio", {})),
        *(("tool_choice", "required"), ("presence_penalty", -2)),
    ],
)
def test_what_would_change_the_answer_is_refused(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=f"^{field} cannot be used here") as caught:
        parse(**{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_value")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *((field, text) for field in ("latency_budget_ms", "price") for text in ("NaN", "Infinity", "1e999", '"5"')),
        *(("latency_budget_ms", text) for text in ("0", "-0.0", "-5", "3600001", "true", "[]")),
        *(("max_tokens", text) for text in ("0", "-1", "1.5", '"3"', "true")),
        *(("stream", text) for text in ("1", '"yes"', "{}")),
        *(("messages", text) for text in ("[]", "null", '"hi"', "[1]", "[{}]", '[{"role":"user","content":5}]')),
        ("messages", '[{"role":"user","content":[{"type":"image_url","image_url":"x"}]}]'),
        ("messages", '[{"role":"user","content":[{"type":"input_audio"}]}]'),
        ("messages", '[{"role":"admin","content":"x"}]'),
        ("knobs", '{"tier":"low"}'),
        ("budget_kind", '"whole"'),
        ("stream_options", "[]"),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, text: str) -> None:
    fields = {"messages": json.dumps(MESSAGES), field: text}
    body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
    with pytest.raises(FieldError, match=f"^{field}") as caught:
        parse_chat(body.encode())
    assert str(caught.value.param).split(".")[0] == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b"null", b"3", b'"x"', b"\xff\xfe", b"{'a': 1}", b'{"a":' * 10_000, b"[" * 100_000),
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"a"}],"max_tokens":' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(FieldError, match=r"^the body") as caught:
        parse_chat(body)
    assert caught.value.code == "invalid_json"


def test_the_lower_limit_of_tokens_binds() -> None:
    assert parse(max_tokens=3, max_completion_tokens=5).most_tokens == 3
    assert parse(max_completion_tokens=5).most_tokens == 5
    assert parse().most_tokens is None
