"""A quiet interpreter while requests are timed: a fixed number of threads and no garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from pacevlm.errors import ConfigError


@contextmanager
def use_num_threads(num_threads: int | None) -> Iterator[None]:
    """Let CPU operations use so many threads inside the block, and as many as before behind it; None changes nothing.

    The number belongs to the whole process.

    Raises:
        ConfigError: the number is not a whole number from 1.
    """
    if num_threads is None:
        yield
        return
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ConfigError(f"num_threads is {num_threads!r}; it must be a whole number from 1, or none for all")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
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
