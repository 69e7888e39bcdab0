"""Open-loop load over HTTP: requests leave when their time has come, whatever became of earlier ones.

The client is a few lines on asyncio's streams, because an ordinary one takes as long for a request as the server's
front does, on the same two cores.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pacevlm.data.metrics import Metric
from pacevlm.types import Example

TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Ask:
    """A question that can be sent again and again.

    Attributes:
        head, tail: JSON of the request in front of and behind its budget.
        example: where it is from.
        metric: scores its answers.
    """

    head: bytes
    tail: bytes
    example: Example
    metric: Metric

    @classmethod
    def of(cls, example: Example, metric: Metric, **fields: Any) -> Ask:
        content = io.BytesIO()
        example.image.save(content, "PNG")
        url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        parts = [{"type": "text", "text": example.question}, {"type": "image_url", "image_url": {"url": url}}]
        body = json.dumps({"messages": [{"role": "user", "content": parts}], **fields})
        return cls(b'{"latency_budget_ms": ', f", {body[1:]}".encode(), example, metric)


@dataclass(frozen=True)
class Sent:
    """What became of a request.

    Attributes:
        status: of HTTP; 0 where no whole answer came.
        sent_s: from the start of the load on.
        client_ms: from its first byte until the answer was read.
        right: 1 for a right answer.
        is_met: whether the server says that it kept the budget.
        report: what the server says of it.
    """

    status: int
    sent_s: float
    client_ms: float
    budget_ms: float
    right: float
    is_met: bool
    report: dict[str, Any]


class Client:
    """Connections to one server, kept open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and content of the answer; status 0 where none came."""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        return await self._exchange(head + body)

    async def get(self, path: str) -> tuple[int, bytes]:
        """The same of a path."""
        return await self._exchange(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n\r\n".encode())

    async def _exchange(self, content: bytes) -> tuple[int, bytes]:
        while True:
            is_used = bool(self.idle)
            try:
                if is_used:
                    reader, writer = self.idle.pop()
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
                writer.write(content)
                async with asyncio.timeout(TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                    answer = await reader.readexactly(int(length[1]) if length else 0)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                # A server may close a connection that was idle; what was sent then never reached it.
                if is_used and not isinstance(error, TimeoutError) and not getattr(error, "partial", b""):
                    continue
                return 0, b""
            if b"connection: close" in head.lower():
                writer.close()
            else:
                self.idle.append((reader, writer))
            return int(head.split(b" ", 2)[1]), answer

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
        self.idle = []

    async def ask(self, ask: Ask, budget_ms: float, started_s: float) -> Sent:
        sent_s = time.perf_counter()
        status, content = await self.post(ask.head + f"{budget_ms:.3f}".encode() + ask.tail)
        client_ms = (time.perf_counter() - sent_s) * 1e3
        right, report = 0.0, {}
        if status == 200:
            values = json.loads(content)
            report = values["pacevlm"]
            right = ask.metric(values["choices"][0]["message"]["content"], ask.example)
        is_met = bool(report.get("budget_met"))
        return Sent(status, sent_s - started_s, client_ms, budget_ms, right, is_met, report)


async def open_loop(
    client: Client, asks: Sequence[Ask], budgets_ms: Sequence[float], requests_per_s: float, seconds: float, seed: Any
) -> list[Sent]:
    """Poisson arrivals for so long, each with a question and a budget drawn; waits for all answers."""
    rng = np.random.default_rng(seed)
    started_s, at_s, tasks = time.perf_counter(), 0.0, []
    while (at_s := at_s + float(rng.exponential(1 / requests_per_s))) < seconds:
        ask, budget_ms = asks[int(rng.integers(len(asks)))], float(rng.choice(budgets_ms))
        if (pause_s := started_s + at_s - time.perf_counter()) > 0:
            await asyncio.sleep(pause_s)
        tasks.append(asyncio.create_task(client.ask(ask, budget_ms, started_s)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    client: Client, asks: Sequence[Ask], budget_ms: float, num_requests: int, num_at_once: int
) -> tuple[list[Sent], float]:
    """So many requests, some at once, the next as soon as one is answered; and the seconds that they took."""
    started_s, results = time.perf_counter(), []
    numbers = iter(range(num_requests))

    async def one_after_another() -> None:
        for number in numbers:
            results.append(await client.ask(asks[number % len(asks)], budget_ms, started_s))  # noqa: PERF401

    await asyncio.gather(*(one_after_another() for _ in range(num_at_once)))
    return results, time.perf_counter() - started_s
