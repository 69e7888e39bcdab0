"""The whole server with a model behind it, from OpenAI's client to the worker and back."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from serving import chat, client_of

ROOT = Path(__file__).resolve().parents[2]
BUDGET_MS, KEY = 60_000, "secret"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@contextmanager
def serving(served_run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pacevlm serve`, which asks for a key, and its address."""
    command = [sys.executable, "-m", "pacevlm", "serve", "--run-dir", str(served_run), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACEVLM_API_KEY": KEY}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        found = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", server.stdout.readline())
        assert found
        yield server, found[1]
        server.kill()


@pytest.fixture(scope="module")
def address(served_run: Path) -> Iterator[str]:
    with serving(served_run) as (_, found):
        yield found


@pytest.fixture
def image(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def test_openais_client_gets_the_same_answer_whole_and_in_pieces(address: str, image: str) -> None:
    messages = chat("How many red digits are there?", image)["messages"]
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        budget = {"latency_budget_ms": BUDGET_MS, "price": 0}
        whole = client.chat.completions.create(model="pacevlm", messages=messages, extra_body=budget)
        pieces = list(
            client.chat.completions.create(model="pacevlm", messages=messages, extra_body=budget, stream=True)
        )
    told = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert told == whole.choices[0].message.content
    paced, last = whole.model_extra["pacevlm"], pieces[-1].model_extra["pacevlm"]
    assert paced["knobs"] == last["knobs"]
    assert paced["budget_met"]
    assert paced["measured_ms"] < paced["upper_bound_ms"] + paced["queue_ms"] + 1000
    assert whole.usage.completion_tokens == len(pieces) - 2 or len(pieces) > 2


def test_a_shorter_answer_is_promised_sooner(address: str, image: str) -> None:
    with client_of(address, headers=AUTHORIZED) as client:
        answers = [
            client.post("/v1/chat/completions", json=chat("How?", image, knobs="low/2/3", **fields)).json()
            for fields in ({}, {"max_tokens": 1})
        ]
    assert answers[1]["usage"]["completion_tokens"] == 1
    assert answers[1]["pacevlm"]["upper_bound_ms"] < answers[0]["pacevlm"]["upper_bound_ms"]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"latency_budget_ms": 300}, 400, "invalid_budget"),
        ({"knobs": "low/99/3"}, 400, "invalid_knobs"),
        ({"question": ""}, 400, "invalid_question"),
        ({"question": "red " * 400}, 400, "invalid_question"),
        ({"question": "1 " * 700}, 400, "invalid_question"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    fields: dict[str, object], status: int, code: str, address: str, image: str
) -> None:
    question = str(fields.pop("question", "How?"))
    with client_of(address, headers=AUTHORIZED) as client:
        answer = client.post("/v1/chat/completions", json=chat(question, image, **fields))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_damaged_picture_is_refused_and_the_next_one_answered(address: str, picture: bytes, image: str) -> None:
    damaged = "data:;base64," + base64.b64encode(picture[: len(picture) // 2]).decode()
    with client_of(address, headers=AUTHORIZED) as client:
        answer = client.post("/v1/chat/completions", json=chat("How?", damaged))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
        assert client.post("/v1/chat/completions", json=chat("How?", image)).status_code == 200


def test_a_key_from_the_environment_is_asked_for(address: str) -> None:
    with client_of(address) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_a_signal_stops_it_in_order(served_run: Path, image: str) -> None:
    # A server of its own: other tests may come later, on this process too.
    with serving(served_run) as (server, address):
        with client_of(address, headers=AUTHORIZED) as client:
            asked = [chat("How?", image), chat("How?", image, knobs="low/99/3")]
            assert [client.post("/v1/chat/completions", json=one).status_code for one in asked] == [200, 400]
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0
    assert out == "stopped; what was accepted is finished\n"
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {line["status"] for line in lines if line["message"] == "request"} >= {200, 400}
    assert all(line["request_id"] for line in lines if line["message"] == "request")


def test_a_port_that_is_taken_is_said_before_anything_loads(
    served_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pacevlm.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--run-dir", str(served_run), "--port", str(port)]) == 2
    assert f"port {port} cannot be listened on" in capsys.readouterr().err


def test_a_bundle_that_is_missing_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pacevlm.cli import main

    assert main(["serve", "--run-dir", str(tmp_path), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pacevlm: error: there is no bundle.json in")
