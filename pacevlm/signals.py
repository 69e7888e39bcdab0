"""Signals that ask a command to stop become one exception, so that what was done so far is kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGHUP, which a closed terminal sends, is not on every system.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked for an orderly stop; whatever keeps work on an interrupt keeps it here as well.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}")


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread on SIGINT, SIGTERM and SIGHUP while the block runs; then put back what was.

    Further signals are ignored while the first one's exception is on its way, so that nothing is cut short. A signal
    that the process was started to ignore, as `nohup` does, stays ignored. Outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    try:
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            # None is a handler that was not set from Python, and could not be put back.
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    error = sys.exception()
    while error is not None:
        if isinstance(error, Stopped):
            return
        error = error.__context__
    raise Stopped(number)
