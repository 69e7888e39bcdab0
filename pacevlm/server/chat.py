"""`/v1/chat/completions`: one request from its body to its answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pacevlm.errors import PacevlmError
from pacevlm.server.asking import read_job
from pacevlm.server.config import ServeConfig
from pacevlm.server.edge import read_body
from pacevlm.server.job import Served
from pacevlm.server.metrics import Metrics
from pacevlm.server.protocol import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    ErrorEnvelope,
    PacingReport,
    parse_chat,
    report,
    report_headers,
    usage,
)
from pacevlm.server.refusals import RefusedError, describe, error_response
from pacevlm.server.remote import PictureFetcher

if TYPE_CHECKING:
    from pacevlm.server.engine import Engine
    from pacevlm.server.ticket import Ticket


class ChatEndpoint:
    """Answers requests through an engine, counts them, and says in the log how each was paced."""

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        self._engine, self._config, self._metrics = engine, config, metrics
        self._fetcher = PictureFetcher(config.image_hosts, config.max_body_bytes)
        self._numbers = itertools.count(1)  # clients may send one id twice

    async def __call__(self, request: Request) -> Response:
        """The answer, or why there is none; what a stream says is decided once its first piece is there."""
        turn: _Turn | None = None
        try:
            asked = parse_chat(await read_body(request, self._config.max_body_bytes))
            self._check_model(asked.model)
            state = request.state
            job = await read_job(
                asked,
                request.headers,
                self._fetcher,
                max_positions=self._engine.outlook.max_positions,
                request_id=f"{state.request_id}-{next(self._numbers)}",
                arrived_s=state.arrived_s,
            )
            turn = _Turn(self._engine.submit(job), request.receive)
            event = await turn.next()
        except BaseException as error:
            if turn is not None:
                turn.leave()
            if isinstance(error, PacevlmError):
                return self.refused(request, error)
            if isinstance(error, ClientDisconnect | asyncio.CancelledError):
                self._metrics.cancelled()
            raise
        head: dict[str, Any] = {
            "id": f"chatcmpl-{job.request_id}",
            "created": int(time.time()),
            "model": self._config.model_name,
        }
        if asked.stream:
            include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return EventStream(self, request, turn, event, head, include_usage=include_usage)
        turn.leave()
        if not isinstance(event, Served):
            raise TypeError(f"a request that wants no stream got {type(event).__name__}")
        found = report(event)
        choice = Choice(message=AssistantMessage(content=event.answer.answer), finish_reason=event.finish_reason)
        completion = ChatCompletion(**head, choices=[choice], usage=usage(event), pacevlm=found)
        return Response(
            completion.model_dump_json(),
            headers=report_headers(found),
            media_type="application/json",
            background=BackgroundTask(self.answered, request, event, found),
        )

    async def answered(self, request: Request, served: Served, found: PacingReport) -> None:
        """Count an answer."""
        self._metrics.answered(served, usage(served))
        request.state.logged.update(
            knobs=str(served.answer.knobs),
            budget_ms=found.budget_ms,
            budget_kind=found.budget_kind,
            budget_met=found.budget_met,
            queue_ms=found.queue_ms,
            answer_ms=found.answer_ms,
            upper_bound_ms=found.upper_bound_ms,
            attempts=found.attempts,
        )

    def refused(self, request: Request, error: PacevlmError) -> Response:
        """Count a refusal; returns what the client is told."""
        self._metrics.refused(error)
        request.state.logged["refused"] = str(error)
        return error_response(error)

    def cancelled(self, request: Request) -> None:
        """Count a client that hung up."""
        self._metrics.cancelled()
        request.state.logged["gone"] = True

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._config.model_name:
            raise RefusedError(
                404,
                f"there is no model {name[:100]!r} here; the one served is {self._config.model_name!r}",
                "model_not_found",
                param="model",
            )


class EventStream(Response):
    """An answer as server-sent events, each piece as soon as it is decoded."""

    media_type = "text/event-stream"

    def __init__(
        self,
        endpoint: ChatEndpoint,
        request: Request,
        turn: _Turn,
        first: str | Served,
        head: dict[str, Any],
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._endpoint, self._request, self._turn, self._first = endpoint, request, turn, first
        self._head, self._include_usage = head, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events():
                data = event if isinstance(event, str) else event.model_dump_json(exclude_unset=True)
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        except ClientDisconnect:
            self._endpoint.cancelled(self._request)
            return
        finally:
            self._turn.leave()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[BaseModel | str]:
        yield self._chunk(Delta(role="assistant", content=""))
        event = self._first
        try:
            while isinstance(event, str):
                yield self._chunk(Delta(content=event))
                event = await self._turn.next()
        except PacevlmError as error:
            self._endpoint.refused(self._request, error)
            yield ErrorEnvelope(error=describe(error)[1])
        else:
            found = report(event)
            await self._endpoint.answered(self._request, event, found)
            yield self._chunk(Delta(), finish_reason=event.finish_reason, pacevlm=found)
            if self._include_usage:
                yield ChatChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage(event))
        yield "[DONE]"

    def _chunk(
        self, delta: Delta, finish_reason: Literal["stop", "length"] | None = None, pacevlm: PacingReport | None = None
    ) -> ChatChunk:
        choice = ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        own: dict[str, Any] = {} if pacevlm is None else {"pacevlm": pacevlm}
        if self._include_usage:
            own["usage"] = None  # null in every chunk but the last, as OpenAI's is
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice], **own)


class _Turn:
    """A request's events, for as long as its client is there.

    Args:
        ticket: of the engine.
        receive: what tells that the client hung up; its body is read.
    """

    def __init__(self, ticket: Ticket, receive: Receive) -> None:
        self._events = aiter(ticket)
        self._gone = asyncio.ensure_future(_until_gone(receive))
        self._gone.add_done_callback(lambda _: ticket.cancel())

    async def next(self) -> str | Served:
        """The next piece, or the whole at the end; raises ClientDisconnect, and what the engine raises."""
        try:
            return await anext(self._events)
        except PacevlmError:
            if self._gone.done():
                raise ClientDisconnect from None
            raise

    def leave(self) -> None:
        """Give the place in the queue up; without effect once all is answered."""
        self._gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
