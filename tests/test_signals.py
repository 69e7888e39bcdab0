"""Signals become one orderly stop, in the command alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pacevlm import cli
from pacevlm.cli import COMMANDS, main
from pacevlm.signals import STOP_SIGNALS, Stopped, stopping_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every test begins with a terminal's handlers, also below `nohup`, and the command puts back what it found."""
    outside = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in outside.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_stopped_command_says_by_what_and_how_to_go_on(
    number: signal.Signals, fresh: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(arguments: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setitem(COMMANDS, "train", work)
    assert main(["train", "--fresh"] if fresh else ["train"]) == 128 + number
    how = "the same command without --fresh" if fresh else "the same command"
    assert capsys.readouterr().err == f"\nstopped by {number.name}; {how} goes on where it stopped\n"


def test_nothing_cuts_an_orderly_stop_short() -> None:
    kept: list[str] = []

    @contextmanager
    def keeping() -> Iterator[None]:
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                raise OSError("while the work is kept, something else goes wrong and is dealt with")
            except OSError:
                os.kill(os.getpid(), signal.SIGINT)
            kept.append("all")

    with pytest.raises(Stopped, match="SIGTERM"), stopping_on_signals(), keeping():
        os.kill(os.getpid(), signal.SIGTERM)
    assert kept == ["all"]


def test_a_stop_that_was_lost_can_be_asked_for_again() -> None:
    def stopped_twice() -> None:
        with suppress(KeyboardInterrupt):  # as a callback that no exception leaves does
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="SIGINT"), stopping_on_signals():
        stopped_twice()


def test_what_the_process_was_told_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            inside = signal.getsignal(signal.SIGTERM)
        assert inside is signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_change_no_handlers() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    with stopping_on_signals():
        inside = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: codes.append(main(["learn"])))
    thread.start()
    thread.join()
    assert codes == [0, cli.USAGE_ERROR]
    assert inside is not signal.getsignal(signal.SIGTERM)
