"""Prefixes that several rows continue, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

from pacevlm.models.decoder import Prefix

Key = TypeVar("Key", bound=Hashable)


class PrefixStore(Generic[Key]):
    """Prefixes by key, the least recently used dropped first once they exceed a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._lock = Lock()
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()

    def get(self, key: Key) -> Prefix | None:
        """The prefix, or None."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Key, prefix: Prefix) -> None:
        """Keep a prefix, unless it is there."""
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = prefix
            self.num_bytes += prefix.num_bytes
            while self.num_bytes > self.max_bytes and len(self._entries) > 1:
                _, old = self._entries.popitem(last=False)
                self.num_bytes -= old.num_bytes
