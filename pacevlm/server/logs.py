"""Logs as lines of JSON on stderr, one a request."""

from __future__ import annotations

import json
import logging
import sys
import time

from pacevlm.printing import printable
from pacevlm.server.config import LogLevel


class JsonFormatter(logging.Formatter):
    """One record as one line: time, level, message, and what stands in its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds, rest = divmod(record.created, 1)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(rest * 1000):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "message": printable(record.getMessage())}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(level: LogLevel) -> None:
    """From now on let the server, and uvicorn beneath it, log lines of JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("pacevlm.server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its own start and end are told by ours
