"""How many bytes the bodies of all requests may take together."""

from __future__ import annotations

import threading

from _mlx_server.inference.memory import release_free_memory
from _mlx_server.inference.protocol import EngineBusy
from _mlx_server.wire.fields import WireError

BUDGET = 512 * 2**20  # bytes of all bodies, as they are read, unpacked and parsed
FREE = 2**20  # bytes of each body that do not count, so that short requests always get in
LARGE = 4 * 2**20  # bytes of a body that leaves so much behind that it is given back at once


class BodyBudget:
    """Counts the bytes that are claimed. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claimed = 0

    def change(self, size: int, limit: int) -> None:
        """Adds `size`, which may be negative. Raises EngineBusy if there are then more than `limit`
        bytes."""
        with self._lock:
            if size > 0 and self._claimed + size > limit:
                raise EngineBusy("the bodies of other requests take all memory there is for them")
            self._claimed += size


class BodyClaim:
    """What one request's body takes of `budget`, which may be full at `limit` bytes."""

    def __init__(self, budget: BodyBudget, limit: int):
        self._budget, self._limit = budget, limit
        self._size = self._most = 0

    def add(self, size: int) -> None:
        """Claims so many more bytes. Raises WireError if no budget can hold that, and EngineBusy if
        there is no room at present."""
        self._resize(self._size + size)

    def reduce(self, size: int) -> None:
        """Gives so many bytes back."""
        self._resize(self._size - size)

    def release(self) -> None:
        """Gives everything back, once nothing that was made of the body is needed any more."""
        self._resize(0)
        if self._most >= LARGE:
            release_free_memory()

    def _resize(self, size: int) -> None:
        counted = max(0, size - FREE)
        if counted > self._limit:
            raise WireError(413, "the body takes too much memory: it has too many values")
        self._budget.change(counted - max(0, self._size - FREE), self._limit)
        self._size, self._most = size, max(self._most, size)
