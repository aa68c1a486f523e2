"""A mapping of bounded size that several threads may use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedMap(Generic[Value]):
    """Maps strings to values and keeps the `most` latest entries.

    Thread-safe: each method holds a lock of this map alone, and runs nobody else's code meanwhile.
    """

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._entries: dict[str, Value] = {}

    def get(self, key: str) -> Value | None:
        """The value of a key, or None."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: str, value: Value) -> None:
        """Sets a value, which becomes the latest; the oldest entries make room for it."""
        with self._lock:
            self._put(key, value)

    def get_or_make(self, key: str, make: Callable[[], Value]) -> Value:
        """The value of a key, made first if there is none. `make` runs without the lock; if two
        threads make a value at the same time, both get the first one."""
        with self._lock:
            if key in self._entries:
                return self._entries[key]
        value = make()
        with self._lock:
            if key not in self._entries:
                self._put(key, value)
            return self._entries[key]

    def _put(self, key: str, value: Value) -> None:
        self._entries.pop(key, None)
        while len(self._entries) >= self._most:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = value
