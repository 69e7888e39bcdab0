"""Sends a server ten thousand fuzzed requests, many at a time, and counts what it answers.

Whatever is sent, the server must answer soon, with a status below 500 or 503, and every refusal must be an error in
JSON with a sentence; it must lose no worker over it, and answer a plain question afterwards as it did before.

    python benchmarks/fuzz_server.py --run-dir runs/quickstart --num-requests 10000 --seed 0
"""

from __future__ import annotations

import base64
import copy
import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.data.digit_tasks import load_digits
from pacevlm.latency.profile import collect_device_facts
from pacevlm.server.protocol import ChatRequest

PATH = "/v1/chat/completions"
MAX_BODY = 400_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e-300, 1e300, -0.0, float("nan"), float("inf"), 10**40, 50, 200, 5000),
    *("", "x", "0", "nan", "\0", "é", "日本語", "\u202e", "x" * 5000, [], {}, [[]], [None], {"": {}}, {"type": "text"}),
    *([[[[[[[[[[]]]]]]]]]], "high/8/16", "low/1/8", "ttft", "e2e", "pacevlm", [{"role": "user", "content": "x"}]),
)
HEADERS = ("x-slo-ttft-ms", "request-timeout-ms", "x-request-id", "content-type", "authorization", "expect", "accept")
TEXTS = (
    "",
    "0",
    "-1",
    "1",
    "80",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "x" * 3000,
    "a b",
    "100-continue",
    "text/plain",
    "\xff",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO")
PATHS = (
    PATH,
    "/v1/models",
    "/health",
    "/metrics",
    "/",
    "/openapi.json",
    "/../..",
    "/%00",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//",
)


@dataclass(frozen=True)
class FuzzOptions:
    """How much is tried, and on what.

    Attributes:
        run_dir: folder of a trained run, or a bundle, with the embedded model.
        num_requests: requests to send.
        num_clients: how many send at a time.
        seed: of the requests.
        timeout_s: a request that takes longer counts as one that hangs, seconds.
        folder: where the result is written.
    """

    run_dir: Path = Path("runs/quickstart")
    num_requests: int = 10_000
    num_clients: int = 8
    seed: int = 0
    timeout_s: float = 30.0
    folder: Path = Path("benchmarks/results")


@dataclass
class Found:
    """What the requests of one kind were answered."""

    statuses: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sent:
    """One request; what is `cut` goes away in the middle of it."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    cut: bool = False
    chunked: bool = False


class Requests:
    """Draws requests, each from its number alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        examples = load_digits("test", 8)
        self.questions = [example.question for example in examples]
        self.pictures = [encoded(example.image, form) for example in examples for form in ("PNG", "JPEG", "WEBP")]
        self.fields = list(ChatRequest.model_fields)

    def draw(self, number: int) -> tuple[str, Sent]:
        """The kind of a request, and what is sent."""
        rng = random.Random(f"{self.seed} {number}")
        kinds = (
            self.plain,
            self.odd_fields,
            self.mangled,
            self.odd_picture,
            self.odd_headers,
            self.odd_body,
            self.odd_path,
        )
        (kind,) = rng.choices(kinds, (1, 8, 4, 4, 3, 1, 2))
        return kind.__name__, kind(rng)

    def asked(self, rng: random.Random, picture: bytes | None = None) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(picture or rng.choice(self.pictures)).decode()
        parts = [
            {"type": "text", "text": rng.choice(self.questions)},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        return {"messages": [{"role": "user", "content": parts}], "latency_budget_ms": rng.choice((60, 200, 2000))}

    def sent(self, asked: Any, **headers: str) -> Sent:
        return Sent("POST", PATH, json.dumps(asked).encode(), headers)

    def plain(self, rng: random.Random) -> Sent:
        return self.sent(self.asked(rng) | {"stream": rng.random() < 0.5})

    def odd_fields(self, rng: random.Random) -> Sent:
        asked = self.asked(rng)
        for _ in range(rng.randint(1, 3)):
            place: Any = asked
            while isinstance(place, (dict, list)) and place and rng.random() < 0.6:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = rng.choice(keys)
                if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                    place[key] = copy.deepcopy(rng.choice(VALUES))
                    break
                place = place[key]
            else:
                asked[rng.choice(self.fields)] = copy.deepcopy(rng.choice(VALUES))
        return self.sent(asked)

    def mangled(self, rng: random.Random) -> Sent:
        body = bytearray(json.dumps(self.asked(rng)).encode())
        for _ in range(rng.randint(1, 4)):
            # Mostly outside the picture, which is nearly all of it.
            place = rng.choice(
                (rng.randrange(len(body)), rng.randrange(min(150, len(body))), len(body) - rng.randint(1, 60))
            )
            body[max(place, 0) : max(place, 0) + rng.randint(0, 3)] = rng.choice(
                (b"", b'"', b"{", b"[" * 500, b"\\ud800", b"\xff", b",", b"1e999", b"null", b"\0")
            )
        return Sent("POST", PATH, bytes(body), {})

    def odd_picture(self, rng: random.Random) -> Sent:
        content = bytearray(rng.choice(self.pictures))
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randint(0, 8)):
            if content:
                # Headers are at the front.
                content[rng.randrange(min(len(content), rng.choice((64, len(content)))))] = rng.randrange(256)
        asked = self.asked(rng, bytes(content))
        if rng.random() < 0.3:
            part = asked["messages"][0]["content"][1]["image_url"]
            part["url"] = rng.choice(
                (
                    *(
                        "",
                        "data:",
                        "data:,x",
                        "data:;base64,",
                        "data:;base64,====",
                        part["url"][:-3],
                        part["url"] + "!",
                    ),
                    *(
                        "http://127.0.0.1/",
                        "https://169.254.169.254/latest",
                        "file:///etc/passwd",
                        "ftp://x",
                        "x" * 9000,
                    ),
                )
            )
        return self.sent(asked)

    def odd_headers(self, rng: random.Random) -> Sent:
        headers = {rng.choice(HEADERS): rng.choice(TEXTS) for _ in range(rng.randint(1, 3))}
        return self.sent(self.asked(rng), **headers)

    def odd_body(self, rng: random.Random) -> Sent:
        whole = json.dumps(self.asked(rng)).encode()
        body = rng.choice(
            (b"", b"{}", b"[" * 100_000, b" " * (MAX_BODY + 1), b"\0" * 1000, whole, whole[: len(whole) // 2])
        )
        return Sent("POST", PATH, body, {}, cut=rng.random() < 0.4, chunked=rng.random() < 0.4)

    def odd_path(self, rng: random.Random) -> Sent:
        path = (
            rng.choice(PATHS)
            if rng.random() < 0.7
            else "/" + "".join(rng.choices("abv1/.%?#&=+~", k=rng.randint(1, 40)))
        )
        return Sent(rng.choice(METHODS), path, rng.choice((b"", b"{}", b"x" * 1000)), {})


def encoded(image: Image.Image, form: str) -> bytes:
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def send(port: int, sent: Sent, timeout_s: float) -> tuple[str, float, list[str]]:
    """What the server answers, in how many seconds, and what is wrong with that."""
    began_s = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.putrequest(sent.method, sent.path, skip_accept_encoding=True)
        for name, value in sent.headers.items():
            connection.putheader(name, value)
        if sent.chunked:
            connection.putheader("transfer-encoding", "chunked")
        else:
            connection.putheader("content-length", str(len(sent.body)))
        connection.endheaders()
        if sent.chunked:
            middle = len(sent.body) // 2
            pieces = [piece for piece in (sent.body[:middle], sent.body[middle:]) if piece]
            body = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
        else:
            body = sent.body
        if sent.cut:
            connection.send(body[: len(body) // 2])
            return "hung up", 0.0, []
        connection.send(body)
        answer = connection.getresponse()
        content = answer.read()
    except TimeoutError:
        return "none", timeout_s, ["hangs"]
    except (OSError, http.client.HTTPException) as error:
        # The server may close on what is no request; it is asked for its health at the end.
        return f"closed ({type(error).__name__})", time.monotonic() - began_s, []
    finally:
        connection.close()
    return str(answer.status), time.monotonic() - began_s, problems_of(answer, content, sent)


def problems_of(answer: http.client.HTTPResponse, content: bytes, sent: Sent) -> list[str]:
    if answer.status >= 500 and answer.status != 503:
        return [f"status {answer.status}: {content[:300]!r}"]
    if answer.status < 400 or sent.method == "HEAD" or answer.getheader("content-type", "").startswith("text/plain"):
        return []  # uvicorn itself answers what is no HTTP, in plain text
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return [f"status {answer.status} without a sentence: {content[:200]!r}"]
    return [] if message and "\n" not in message else [f"no sentence: {message!r}"]


def main(options: FuzzOptions) -> None:
    """Send all requests and print what they were answered."""
    console = Console(stderr=True)
    requests = Requests(options.seed)
    command = [sys.executable, "-m", "pacevlm", "serve", "--run-dir", str(options.run_dir), "--port", "0"]
    command += ["--max-body-bytes", str(MAX_BODY), "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            said: list[str] = []
            assert server.stderr is not None
            listener = threading.Thread(target=lambda: said.extend(server.stderr or ()))
            listener.start()
            before = ask_plainly(port, requests)
            found, seconds = send_all(port, requests, options, console)
            after = ask_plainly(port, requests)
            metrics = get(port, "/metrics")
        finally:
            server.terminate()
            server.wait(60)
    listener.join()
    restarts = int(float(re.findall(r"^pacevlm:worker_restarts_total (\S+)", metrics, re.M)[0]))
    faults = [line for line in said if '"level": "error"' in line or "Traceback" in line]
    for name, ok in (("answers changed", before == after), ("a worker died", restarts == 0), ("faults", not faults)):
        if not ok:
            console.print(f"{name}: {before} {after} {restarts} {faults[:3]}", markup=False)
    table = Table("request", "sent", "statuses", "longest s", "problems")
    for kind, entry in sorted(found.items()):
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(entry.statuses.items()))
        problems = str(len(entry.problems))
        table.add_row(kind, str(sum(entry.statuses.values())), statuses, f"{entry.longest_s:.1f}", problems)
    console.print(table)
    total = sum((entry.statuses for entry in found.values()), Counter[str]())
    results: dict[str, Any] = {
        **provenance(collect_device_facts("cpu", torch.float32)),
        "seed": options.seed,
        "num_requests": options.num_requests,
        "seconds": round(seconds, 1),
        "num_problems": sum(len(entry.problems) for entry in found.values()),
        "num_server_errors": sum(
            count for status, count in total.items() if status.startswith("5") and status != "503"
        ),
        "worker_restarts": restarts,
        "logged_faults": len(faults),
        "answers_unchanged": before == after,
        "statuses": dict(sorted(total.items())),
        "kinds": {
            kind: {"statuses": dict(sorted(entry.statuses.items())), "longest_s": round(entry.longest_s, 2)}
            for kind, entry in sorted(found.items())
        },
    }
    write_result(results, options.folder, "fuzz-server", console)
    if results["num_problems"] or restarts or faults or before != after:
        sys.exit(1)


def send_all(port: int, requests: Requests, options: FuzzOptions, console: Console) -> tuple[dict[str, Found], float]:
    found: dict[str, Found] = {}
    lock = threading.Lock()

    def one(number: int) -> None:
        kind, sent = requests.draw(number)
        status, seconds, problems = send(port, sent, options.timeout_s)
        with lock:
            entry = found.setdefault(kind, Found())
            entry.statuses[status] += 1
            entry.longest_s = max(entry.longest_s, seconds)
            entry.problems += problems
        for problem in problems:
            console.print(f"{number} {kind}: {problem}", markup=False)

    began_s = time.monotonic()
    with ThreadPoolExecutor(options.num_clients) as pool:
        list(pool.map(one, range(options.num_requests)))
    return found, time.monotonic() - began_s


def ask_plainly(port: int, requests: Requests) -> list[str]:
    """Answers with given knobs, which do not depend on time."""
    answers = []
    for number in range(4):
        rng = random.Random(number)
        asked = requests.asked(rng) | {"knobs": "high/8/16", "latency_budget_ms": 60_000}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", PATH, json.dumps(asked))
        answers.append(json.loads(connection.getresponse().read())["choices"][0]["message"]["content"])
        connection.close()
    return answers


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


if __name__ == "__main__":
    main(tyro.cli(FuzzOptions, description=__doc__))
