"""A server for a test: the true application and uvicorn, in a thread, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from pacevlm.server.app import create_app
from pacevlm.server.config import ServeConfig
from pacevlm.server.listening import Listener


@contextmanager
def serving(engine: Any, api_key: str | None = None, **settings: Any) -> Iterator[str]:
    """The address while it is served; at the end everything that was accepted is answered."""
    config = ServeConfig(port=0, **settings)
    ready = threading.Event()
    listener = Listener(create_app(engine, config, api_key), config, lambda _: ready.set())
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(listener.listen())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        assert not failures
        yield listener.address
    finally:
        listener.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
    assert not failures


def client_of(address: str, **settings: Any) -> httpx2.Client:
    return httpx2.Client(base_url=address, timeout=30, **settings)


def chat(question: str = "How many?", image: str | None = None, **fields: Any) -> dict[str, Any]:
    """A request's JSON."""
    content: Any = question
    if image is not None:
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image}}]
    return {"messages": [{"role": "user", "content": content}], **fields}
