"""What is in front of the queue, with a stand-in behind it: answers, streams, errors, hostile and vanishing clients."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import math
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image
from serving import chat, client_of, serving
from stand_in_engine import PIECES, StandInEngine

from pacevlm.errors import DeadlineError, OverloadError, WorkerError
from pacevlm.server import edge, listening

PATH = "/v1/chat/completions"
MAX_BODY = 200_000


def data_url(width: int = 40, height: int = 30) -> str:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[StandInEngine, str]]:
    engine = StandInEngine()
    with serving(engine, max_body_bytes=MAX_BODY) as address:
        yield engine, address


@pytest.fixture
def engine(shared: tuple[StandInEngine, str]) -> StandInEngine:
    shared[0].__init__()  # type: ignore[misc]
    shared[0].ready = True
    return shared[0]


@pytest.fixture
def address(shared: tuple[StandInEngine, str], engine: StandInEngine) -> str:
    return shared[1]


# Answers -------------------------------------------------------------------------------------------------------------


def test_openais_client_gets_an_answer_and_how_it_was_paced(engine: StandInEngine, address: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="pacevlm",
            messages=chat(image=data_url())["messages"],
            max_tokens=5,
            temperature=0,
            extra_body={"latency_budget_ms": 500, "price": 3},
            extra_headers={"x-slo-ttft-ms": "300", "x-request-id": "mine"},
        )
        assert [model.id for model in client.models.list()] == ["pacevlm"]
    answer = raw.parse()
    assert answer.choices[0].message.content == "".join(PIECES)
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (16, 3, 19)
    (job,) = engine.jobs
    assert job.budgets_ms == {"e2e": 500, "ttft": 300}
    assert (job.price, job.max_new_tokens, job.question) == (3.0, 5, "How many?")
    paced = answer.model_extra["pacevlm"]
    assert paced["knobs"] == {"tier": "low", "top_k": 4, "num_blocks": 12}
    assert paced["budget_met"] is True
    assert math.isclose(paced["measured_ms"], paced["queue_ms"] + paced["answer_ms"], abs_tol=0.01)
    assert raw.headers["x-pacevlm-knobs"] == "low/4/12"
    assert raw.headers["x-pacevlm-budget-met"] == "true"
    assert float(raw.headers["x-pacevlm-measured-ms"]) == paced["measured_ms"]
    assert raw.headers["x-request-id"] == "mine"


def test_a_stream_brings_pieces_then_how_it_was_paced_then_the_usage(address: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        for include in (True, False):
            stream = client.chat.completions.create(
                model="pacevlm", messages=chat()["messages"], stream=True, stream_options={"include_usage": include}
            )
            chunks = list(stream)
            told = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
            assert told == ["", *PIECES, None]
            last = chunks[-2 if include else -1]
            assert last.choices[0].finish_reason == "stop"
            assert last.model_extra["pacevlm"]["knobs"]["tier"] == "low"
            assert [chunk.usage is not None for chunk in chunks] == [False] * 5 + [True] * include
            assert len({chunk.id for chunk in chunks}) == 1
    with client_of(address) as plain:
        text = plain.post(PATH, json=chat(stream=True)).text
    assert text.endswith("data: [DONE]\n\n")
    assert "usage" not in text


def test_forced_knobs_without_a_budget_promise_nothing(address: str) -> None:
    with client_of(address) as client:
        answer = client.post(PATH, json=chat(knobs="high/8/16"))
        paced = answer.json()["pacevlm"]
    assert paced["knobs"] == {"tier": "high", "top_k": 8, "num_blocks": 16}
    assert paced["budget_ms"] is None
    assert "x-pacevlm-budget-ms" not in answer.headers


def test_two_requests_of_one_id_are_two(engine: StandInEngine, address: str) -> None:
    with client_of(address, headers={"x-request-id": "same"}) as client:
        ids = [client.post(PATH, json=chat()).json()["id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert all("same" in name for name in ids)
    assert len({job.request_id for job in engine.jobs}) == 2


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (OverloadError("too much", 1.2, 90.0), 429, "budget_cannot_be_met", "2"),
        (OverloadError("too much", math.inf, math.inf), 429, "budget_cannot_be_met", None),
        (DeadlineError("over"), 408, "deadline_expired", None),
        (WorkerError("gone"), 503, "worker_lost", "5"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_its_status(
    error: Any, status: int, code: str, retry: str | None, stream: bool, engine: StandInEngine, address: str
) -> None:
    engine.error = error
    with client_of(address) as client:
        answer = client.post(PATH, json=chat(stream=stream))
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry)
    body = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(body)
    assert (body["message"], body["code"]) == (str(error), code)
    if retry == "2":
        assert (body["retry_after_s"], body["soonest_budget_ms"]) == (1.2, 90.0)
        assert answer.headers["retry-after-ms"] == "1200"


def test_an_error_in_a_stream_is_a_line_of_it(engine: StandInEngine, address: str) -> None:
    engine.late_error = WorkerError("gone")
    with client_of(address) as client:
        answer = client.post(PATH, json=chat(stream=True))
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert json.loads(lines[-2])["error"]["code"] == "worker_lost"
        assert lines[-1] == "[DONE]"
        assert client.post(PATH, json=chat()).status_code == 503
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as official,
        pytest.raises(openai.APIError, match="gone"),
    ):
        list(official.chat.completions.create(model="pacevlm", messages=chat()["messages"], stream=True))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", PATH, chat(model="gpt-4o"), 404),
        ("POST", PATH, chat(temperature=1), 400),
        ("POST", PATH, chat(image="data:image/png;base64,AAAA"), 400),
        ("POST", PATH, chat(image="https://example.org/a.png"), 400),
        ("POST", PATH, chat("x" * 100_000), 400),
        ("POST", PATH, chat(latency_budget_ms=1e300), 400),
        ("POST", PATH, chat(knobs="high/99/16"), 400),
        ("GET", PATH, None, 405),
        ("POST", "/v1/completions", chat(), 405),
        ("GET", "/nothing", None, 404),
        ("GET", "/../../etc/passwd", None, 404),
        ("GET", "/%2e%2e/%2e%2e/pyproject.toml", None, 404),
    ],
)
def test_refusals_are_sentences(method: str, path: str, body: Any, status: int, address: str) -> None:
    with client_of(address) as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_picture_with_too_many_pixels_is_refused_by_its_header(engine: StandInEngine, address: str) -> None:
    """Its header says how many pixels it has, and more than allowed are refused for that."""
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    huge = bytearray(content.getvalue())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    with client_of(address) as client:
        answer = client.post(PATH, json=chat(image="data:;base64," + base64.b64encode(huge).decode()))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"
    assert engine.jobs == []


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with serving(StandInEngine(), "secret") as address, client_of(address) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            for answer in (client.post(PATH, json=chat(), headers=headers), client.get("/v1/models", headers=headers)):
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
        assert client.post(PATH, json=chat(), headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


# Hostile clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_while_it_is_read(
    chunked: bool, engine: StandInEngine, address: str
) -> None:
    content = json.dumps(chat(image="data:;base64," + "A" * 4 * MAX_BODY)).encode()
    pieces = (content[start : start + 50_000] for start in range(0, len(content), 50_000))
    with client_of(address) as client:
        answer = client.post(PATH, content=pieces if chunked else content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
        assert client.post(PATH, json=chat()).status_code == 200
    assert len(engine.jobs) == 1


def connect(address: str, *parts: bytes) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    for part in parts:
        connection.sendall(part)
    return connection


def head(length: int) -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n".encode()


def test_a_body_that_does_not_arrive_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_TIMEOUT_S", 0.2)
    with connect(address, head(1000), b'{"messages"') as connection:
        answer = connection.makefile("rb").read()
    assert b" 408 " in answer
    assert b"body_timeout" in answer


@pytest.mark.parametrize("parts", [[], [b"POST /v1"], [head(2) + b"{}", b"POST /v1"]])
def test_headers_that_do_not_arrive_are_given_up(
    parts: list[bytes], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HEADER_TIMEOUT_S", 0.2)
    with connect(address, *parts[:1]) as connection, connection.makefile("rb") as received:
        if len(parts) > 1:
            assert b" 400 " in received.readline()
            connection.sendall(parts[1])
        began_s = time.monotonic()
        received.read()
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(stream: bool, engine: StandInEngine, address: str) -> None:
    engine.seconds = 30
    with client_of(address) as client:
        before = num_cancelled(client)
    body = json.dumps(chat(stream=stream)).encode()
    connect(address, head(len(body)), body[:5]).close()  # in the middle of its body
    with connect(address, head(len(body)), body):
        wait_until(lambda: len(engine.jobs) == 1)
    wait_until(lambda: engine.cancelled == [engine.jobs[0].request_id])
    with client_of(address) as client:
        wait_until(lambda: num_cancelled(client) == before + 2)


def num_cancelled(client: httpx2.Client) -> float:
    found = re.search(r"pacevlm:requests_cancelled_total ([0-9.]+)", client.get("/metrics").text)
    assert found is not None
    return float(found[1])


def wait_until(condition: Any) -> None:
    until_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_nonsense_instead_of_http_is_refused(address: str) -> None:
    for text in (b"\x16\x03\x01\x02", b"GET / HTTP/1.1", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: x"):
        with connect(address, text + b"\r\n\r\n") as connection, connection.makefile("rb") as received:
            assert b" 400 " in received.read()
    with client_of(address) as client:
        assert client.get("/health").status_code == 200


# Operating -----------------------------------------------------------------------------------------------------------


def test_health_follows_the_engine(engine: StandInEngine, address: str) -> None:
    with client_of(address) as client:
        assert client.get("/health").status_code == 200
        engine.ready = False
        answer = client.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_metrics_count_what_happened(engine: StandInEngine) -> None:
    with serving(engine) as address, client_of(address) as client:
        for fields in ({}, {"latency_budget_ms": 1e-6}, {"knobs": "high/8/16"}, {"n": 2}):
            client.post(PATH, json=chat(**fields))
        found = {
            name: float(value)
            for name, value in (
                line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
            )
        }
    wanted = {
        "time_to_first_token_seconds_count": 3,
        "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 3,
        'request_success_total{finished_reason="stop"}': 3,
        'requests_by_knobs_total{num_blocks="16",tier="high",top_k="8"}': 1,
        'budgets_total{kind="e2e",outcome="late"}': 1,
        'requests_refused_total{reason="unsupported_value"}': 1,
        "requests_accepted_total": 3,
        "num_requests_waiting": 0,
        "drift_factor": 1,
        "generation_tokens_total": 9,
    }
    assert {name: found[f"pacevlm:{name}"] for name in wanted} == wanted


def test_a_stop_finishes_what_was_accepted(engine: StandInEngine) -> None:
    engine.seconds = 0.5
    with contextlib.ExitStack() as stack:
        with serving(engine) as address:
            body = json.dumps(chat()).encode()
            waiting = stack.enter_context(connect(address, head(len(body)), body))
            stack.enter_context(connect(address))  # idle, and keeps nobody waiting
            wait_until(lambda: len(engine.jobs) == 1)
        assert b" 200 " in waiting.makefile("rb").read()
    assert engine.served == 1
    assert not engine.ready


def test_the_page_and_its_samples_come_from_here(address: str) -> None:
    with client_of(address) as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        samples = client.get("/samples").json()
        assert {"detail", "thought", "overview", "knowledge"} == {sample["task"] for sample in samples}
        sample = samples[0]
        answer = client.post(PATH, json=chat(sample["question"], sample["image"]))
    assert sample["references"]
    assert answer.status_code == 200


def test_time_counts_from_the_first_byte(engine: StandInEngine, address: str) -> None:
    """Slow headers and a slow body are time of the budget, on a connection's first request and on the next."""
    body = json.dumps(chat()).encode()
    with connect(address) as connection:
        for number in range(2):
            began_s = time.perf_counter()
            connection.sendall(head(len(body))[:20])
            time.sleep(0.1)
            connection.sendall(head(len(body))[20:] + body[:10])
            time.sleep(0.1)
            sent_s = time.perf_counter()
            connection.sendall(body[10:])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert json.loads(answer.read())["pacevlm"]["queue_ms"] > 190
            assert began_s <= engine.jobs[number].arrived_s <= sent_s - 0.19
