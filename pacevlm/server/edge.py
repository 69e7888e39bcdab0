"""What surrounds every request: when it arrived, its name, its key, its size, its line in the log, and faults."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pacevlm.server.refusals import RefusedError, envelope_response, error_response, plain_error

BODY_TIMEOUT_S = 30.0
"""Longest that a request's body may take to arrive."""
LINGER_S = 2.0
"""How long the rest of what is refused for its size is read, so that the client hears why."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_LOG = logging.getLogger("pacevlm.server")


class Edge:
    """ASGI middleware around the whole application.

    Every request has `state.arrived_s` (`time.perf_counter()`), `state.request_id`, which is the client's own
    `x-request-id` where it sent one, and `state.logged`, which collects what its line in the log says besides.

    Args:
        app: what answers.
        api_key: what `/v1` asks for as bearer token; None asks for nothing.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        # The listener saw its first byte; other servers tell no time.
        arrived_s = state.get("arrived_s", time.perf_counter())
        logged: dict[str, object] = {"method": scope["method"], "path": scope["path"]}
        state.update(arrived_s=arrived_s, request_id=request_id, logged=logged)
        status: int | None = None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        level = logging.INFO if scope["path"] == "/v1/chat/completions" else logging.DEBUG
        try:
            if self._api_key is not None and scope["path"].startswith("/v1") and not self._is_allowed(headers):
                refusal = RefusedError(
                    401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key"
                )
                await error_response(refusal)(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        except ClientDisconnect:
            logged["gone"] = True
        except Exception:
            level = logging.ERROR
            _LOG.exception("a fault of pacevlm itself", extra={"fields": {"request_id": request_id}})
            if status is None:
                body = plain_error(500, "a fault of the server itself; its log says more under this request's id")
                await envelope_response(500, body)(scope, receive, send_named)
        finally:
            took_ms = round((time.perf_counter() - arrived_s) * 1e3, 3)
            fields = {"request_id": request_id, "status": status, "took_ms": took_ms, **logged}
            _LOG.log(level, "request", extra={"fields": fields})

    def _is_allowed(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # The comparison takes the same time whatever is wrong with the token.
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._api_key or b"")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """A request's body; what is beyond the most allowed is not kept.

    Raises:
        RefusedError: it is too large, or takes too long to arrive.
        ClientDisconnect: the client is gone.
    """
    too_large = RefusedError(
        413,
        f"the request has more than {max_bytes:,} bytes, which is the most; send a smaller picture, or pack it better",
        "too_large",
        must_close=True,
    )
    stated = request.headers.get("content-length", "")
    is_too_large = stated.isdigit() and (len(stated) > 18 or int(stated) > max_bytes)
    if is_too_large and "expect" in request.headers:
        raise too_large  # the client asks before it sends
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more and not is_too_large:
                piece, more = await _next_piece(request)
                body += piece
                is_too_large = len(body) > max_bytes
    except TimeoutError:
        raise RefusedError(
            408, f"the request's body did not arrive within {BODY_TIMEOUT_S:g} s", "body_timeout", must_close=True
        ) from None
    if not is_too_large:
        return bytes(body)
    body.clear()
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while more:
                _, more = await _next_piece(request)
    raise too_large


async def _next_piece(request: Request) -> tuple[bytes, bool]:
    """What has arrived, and whether there is more."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)
