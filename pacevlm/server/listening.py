"""Listening: the socket, the signals that end it in order, and connections that have to come to their point."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pacevlm.errors import ConfigError
from pacevlm.server.config import ServeConfig
from pacevlm.signals import STOP_SIGNALS

HEADER_TIMEOUT_S = 10.0
"""Longest that a request's headers may take, from the connection or from their first byte."""
KEEP_ALIVE_S = 20.0
"""How long a connection may be idle between requests."""
SPARE_CONNECTIONS = 512
"""Connections beyond those whose requests wait; more are answered 503 at once."""


class Listener(uvicorn.Server):
    """Serves an application until a signal or `should_exit` ends it; what was accepted is finished first.

    Args:
        app: what answers; its lifespan is kept around the listening.
        config: where to listen; a free port if that is 0.
        on_ready: told the address once requests are answered.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, app: FastAPI, config: ServeConfig, on_ready: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_PatientProtocol,
                ws="none",
                lifespan="off",  # kept by `listen`, where what it raises is heard
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(KEEP_ALIVE_S),
                limit_concurrency=config.max_waiting + SPARE_CONNECTIONS,
                h11_max_incomplete_event_size=1 << 15,
            )
        )
        self._app, self._on_ready = app, on_ready
        self._socket = _bound_socket(config.host, config.port)  # before a model is loaded for nothing
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def listen(self) -> None:
        """Start the application, serve it, stop it; nobody is heard before it has started."""
        try:
            async with self._app.router.lifespan_context(self._app):
                await self.serve(sockets=[self._socket])
        finally:
            self._socket.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_ready(self.address)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals that ask for a stop end the listening, and nothing else; one that is ignored stays so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _PatientProtocol(H11Protocol):
    """HTTP/1.1 that knows when a request's first byte came, and closes a connection whose headers do not arrive."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Stamp the first byte of a request with its time, and wait on until its headers are whole."""
        if self._is_between() and "arrived_s" not in self.app_state:
            self.app_state = {"arrived_s": time.perf_counter()}  # what `state` of the request begins with
        super().data_received(data)
        if not self._is_between():
            self.app_state = {}  # one that came in one piece with this has no time of its own yet
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_timer()

    def _watch_headers(self) -> None:
        # Between requests uvicorn's own timer runs, until the next one's first byte.
        if not self._is_between() or self.timeout_keep_alive_task is not None:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        # Not while a request runs that came in one piece with the end of the one before.
        if self._is_between():
            self.transport.close()

    def _is_between(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket that nobody can reach yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"host {host} and port {port} cannot be listened on: {error.strerror or error}; give others as --host and "
            "--port"
        ) from error
    return bound
