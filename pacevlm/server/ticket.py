"""What a client's side of the server holds of an accepted request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from pacevlm.errors import PacevlmError
from pacevlm.server.job import Job, Served

if TYPE_CHECKING:
    from pacevlm.server.engine import Engine
    from pacevlm.server.outlook import Look


class Ticket:
    """An accepted request: iterate over it for the pieces of its answer and, at last, what was served.

    Raises while iterated:
        DeadlineError: its budget was over before it could begin.
        WorkerError: it could not be run.
        ImageError, QuestionError: only running it showed that it cannot be used.
    """

    def __init__(self, engine: Engine, job: Job, look: Look) -> None:
        self.job, self.look = job, look
        self.attempts = 0
        self.is_over = False
        self.timer: asyncio.TimerHandle | None = None  # of its deadline in the queue
        self._engine = engine
        self._events: asyncio.Queue[str | Served | PacevlmError] = asyncio.Queue()
        self._token_ids: list[int] = []
        self._told = ""

    async def __aiter__(self) -> AsyncIterator[str | Served]:
        while True:
            event = await self._events.get()
            if isinstance(event, PacevlmError):
                raise event
            yield event
            if isinstance(event, Served):
                return

    def cancel(self) -> None:
        """Nobody wants the answer any more: a waiting request leaves the queue, a running one is finished in vain."""
        self._engine.cancel(self)

    def add_token(self, token_id: int) -> None:
        """Tell the text that a new token adds, once it is whole."""
        self._token_ids.append(token_id)
        text = self._engine.outlook.model.adapter.decode(self._token_ids)
        # A character of several tokens shows as a replacement character until its last one.
        if text.startswith(self._told) and not text.endswith("\ufffd") and text != self._told:
            self._events.put_nowait(text[len(self._told) :])
            self._told = text

    def finish(self, event: Served | PacevlmError) -> None:
        """End it, once; what comes later is dropped."""
        if self.is_over:
            return
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()  # else as many would be kept as were accepted within the longest budget
        if self.job.stream and isinstance(event, Served) and (rest := event.answer.answer[len(self._told) :]):
            self._events.put_nowait(rest)
        self._events.put_nowait(event)
