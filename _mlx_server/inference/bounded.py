"""A mapping of bounded size that several threads may use."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

ENTRY = 100  # bytes of an entry's place in a mapping, at most


def text_bytes(key: str, text: str) -> int:
    """The size of an entry whose value is a text, in bytes."""
    return sys.getsizeof(key) + sys.getsizeof(text) + ENTRY


def value_bytes(value: Any) -> int:
    """The size of a JSON value with all that it holds, in bytes."""
    size, left = 0, [value]
    while left:
        one = left.pop()
        size += sys.getsizeof(one)
        if isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one
    return size


class BoundedMap(Generic[Value]):
    """Maps strings to values and keeps the latest entries, at most `most` of them or, with `size`,
    as many as have that size together.

    Thread-safe: each method holds a lock of this map alone, and runs nobody else's code meanwhile.
    """

    def __init__(self, most: int, size: Callable[[str, Value], int] = lambda key, value: 1):
        self._most, self._size = most, size
        self._total = 0
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
            return self._entries.get(key, value)

    def items(self) -> list[tuple[str, Value]]:
        """The keys and their values, the latest last."""
        with self._lock:
            return list(self._entries.items())

    def _put(self, key: str, value: Value) -> None:
        if key in self._entries:
            self._remove(key)
        size = self._size(key, value)
        if size > self._most:
            return
        while self._total + size > self._most:
            self._remove(next(iter(self._entries)))
        self._entries[key] = value
        self._total += size

    def _remove(self, key: str) -> None:
        self._total -= self._size(key, self._entries.pop(key))
