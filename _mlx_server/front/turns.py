"""How many requests are prepared at the same time: parsed, checked, rendered and tokenised."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
from collections.abc import Callable, Iterator

from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.inference.protocol import EngineBusy, Priority

# Requests whose keys allow no higher priority; those for the highest are all prepared at once
PLACES = {Priority.LOW: 1, Priority.NORMAL: 8}
MAX_WAITING = 64  # for a turn, of each priority; the connections of others are not counted
_POLL = 1.0  # seconds between two checks of whether a client that waits is still there


class Turns:
    """Preparing a long prompt takes seconds of Python, which only one thread runs at a time. So
    requests with less important keys wait for each other here, and a more important one competes
    with few of them, however many there are. Any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.Counter[Priority] = collections.Counter()
        self._preparing: collections.Counter[Priority] = collections.Counter()

    @contextlib.contextmanager
    def take(self, priority: Priority, is_client_gone: Callable[[], bool]) -> Iterator[None]:
        """Within it a request is prepared whose key allows at most `priority`. Raises EngineBusy
        if too many wait, and ClientDisconnected."""
        with self._changed:
            if self._waiting[priority] >= MAX_WAITING:
                raise EngineBusy("too many requests with such keys are being prepared")
            self._waiting[priority] += 1
            try:
                while self._preparing[priority] >= PLACES.get(priority, math.inf):
                    self._changed.wait(_POLL)
                    if is_client_gone():
                        raise ClientDisconnected
            finally:
                self._waiting[priority] -= 1
            self._preparing[priority] += 1
        try:
            yield
        finally:
            with self._changed:
                self._preparing[priority] -= 1
                self._changed.notify_all()
