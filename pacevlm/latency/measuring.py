"""A quiet interpreter while requests are timed: a fixed number of threads and no garbage collection."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pacevlm.checks import as_int
from pacevlm.errors import ConfigError


def available_threads() -> int:
    """CPUs that this process may run on."""
    # Not every system tells which of its CPUs a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_num_threads(num_threads: int | None) -> None:
    """Raise ConfigError unless CPU operations can use so many threads here; None means as many as they do already."""
    if num_threads is None:
        return
    number = as_int(num_threads)
    if number is None or number < 1:
        raise ConfigError(f"num_threads is {num_threads!r}; it must be a whole number from 1, or none for all")
    if number > available_threads():
        raise ConfigError(
            f"num_threads is {num_threads}, but this process may use {available_threads()} CPUs; set "
            "profile.num_threads to at most so many"
        )


@contextmanager
def use_num_threads(num_threads: int | None) -> Iterator[None]:
    """Let CPU operations use so many threads inside the block, and as many as before behind it; None changes nothing.

    The number belongs to the whole process.

    Raises:
        ConfigError: the number is not a whole number from 1, or there are fewer CPUs here.
    """
    check_num_threads(num_threads)
    if num_threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(num_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not inside the block, so that no request pays for another one's litter."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
