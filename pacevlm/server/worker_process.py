"""The worker as its front sees it: a process, and the socket to it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from typing import Any

from pacevlm.server.config import ServeConfig
from pacevlm.server.wire import HEAD, NO_IMAGE, pack

log = logging.getLogger("pacevlm.server")

STOP_S = 20.0
"""So long a worker may take to end once it is told to."""
# Most that is buffered of a stream.
STREAM_LIMIT = 2**20


class WorkerProcess:
    """A worker process, and the socket to it.

    Attributes:
        body: bytes of the last message.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.body = b""

    @classmethod
    async def start(cls, config: ServeConfig) -> WorkerProcess:
        """Start one, which loads and then says that it is ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pacevlm.server.worker",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is the front's
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=STREAM_LIMIT)
        worker = cls(process, reader, writer)
        worker.send(
            {
                "run_dir": str(config.run_dir),
                "model_path": config.model_path,
                "device": config.device,
                "policy": config.policy,
                "drift_path": None if config.drift_path is None else str(config.drift_path),
                "log_level": config.log_level,
            }
        )
        return worker

    def send(self, message: dict[str, Any], body: bytes = NO_IMAGE) -> None:
        """Send a message, without waiting until it has been read."""
        self.writer.write(pack(message, body))

    async def receive(self) -> dict[str, Any]:
        """The next message; raises ConnectionError or IncompleteReadError if there is none."""
        num_text, num_body = HEAD.unpack(await self.reader.readexactly(HEAD.size))
        message: dict[str, Any] = json.loads(await self.reader.readexactly(num_text))
        self.body = await self.reader.readexactly(num_body)
        return message

    async def stop(self) -> None:
        """Let it end in order, or kill it."""
        try:
            self.send({"type": "stop"})
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except (ConnectionError, TimeoutError):
            log.warning("the worker did not end in %.0f s and is killed", STOP_S)
        await self.kill()

    async def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self.writer.close()
