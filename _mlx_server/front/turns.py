"""How many requests are prepared at the same time, parsed, checked, rendered and tokenised, and how
many begin in a second."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.inference.protocol import EngineBusy, Priority

# Requests whose keys allow no higher priority; those for the highest are all prepared at once
PLACES = {Priority.LOW: 1, Priority.NORMAL: 8}
MAX_WAITING = 64  # for a turn, of each priority; the connections of others are not counted
GAP = 0.002  # seconds between two requests of a kind of which thousands may come
_POLL = 1.0  # seconds between two checks of whether a client that waits is still there


class Turns:
    """Preparing a long prompt takes seconds of Python, which only one thread runs at a time, and
    each of those that want to may keep it for milliseconds. So requests with less important keys
    wait for each other here, and a more important one competes with few of them, however many there
    are. Any thread may use it."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self._changed = {priority: threading.Condition(lock) for priority in Priority}
        self._waiting: collections.Counter[Priority] = collections.Counter()
        self._preparing: collections.Counter[Priority] = collections.Counter()

    @contextlib.contextmanager
    def take(
        self, priority: Priority, is_client_gone: Callable[[], bool], most: float | None = None
    ) -> Iterator[Turn]:
        """Within it a request is prepared whose key allows at most `priority`. Raises EngineBusy
        if `most` wait, by default MAX_WAITING, and ClientDisconnected."""
        turn = Turn(self, priority, is_client_gone)
        turn.begin(MAX_WAITING if most is None else most)
        try:
            yield turn
        finally:
            turn.end()

    def begin(self, priority: Priority, is_client_gone: Callable[[], bool], most: float) -> None:
        """Waits for a place. Raises EngineBusy if `most` wait, and ClientDisconnected."""
        with self._changed[priority]:
            if self._waiting[priority] >= most:
                raise EngineBusy("too many requests with such keys are being prepared")
            self._waiting[priority] += 1
            try:
                while self._preparing[priority] >= PLACES.get(priority, math.inf):
                    self._changed[priority].wait(_POLL)
                    if is_client_gone():
                        self._changed[priority].notify()  # this one may have been told of a place
                        raise ClientDisconnected
            finally:
                self._waiting[priority] -= 1
            self._preparing[priority] += 1

    def end(self, priority: Priority) -> None:
        """Gives a place to who waits."""
        with self._changed[priority]:
            self._preparing[priority] -= 1
            self._changed[priority].notify()


class Turn:
    """A request's turn, which it may give to others for a while."""

    def __init__(self, turns: Turns, priority: Priority, is_client_gone: Callable[[], bool]):
        self._turns, self._priority, self._is_client_gone = turns, priority, is_client_gone
        self._held = False

    def begin(self, most: float = math.inf) -> None:
        """Waits for it. Raises EngineBusy if `most` do, and ClientDisconnected."""
        self._turns.begin(self._priority, self._is_client_gone, most)
        self._held = True

    def end(self) -> None:
        """Ends it, if it has not been given away."""
        if self._held:
            self._held = False
            self._turns.end(self._priority)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the request only waits for its client. Leaving raises ClientDisconnected."""
        self.end()
        yield
        self.begin()


class Pace:
    """Lets requests begin one after the other, GAP apart. Even those that cost next to nothing hold
    up all others if a hundred threads have such ones without a pause: each of them may run Python
    before a more important one does so again. Any thread may use it."""

    def __init__(self) -> None:
        self.gap = GAP
        self._lock = threading.Lock()
        self._next = 0.0  # when the next one may begin, in monotonic seconds

    def wait(self) -> None:
        """Waits until one more request may begin."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self.gap
        if begin > now:
            time.sleep(begin - now)
