"""How many requests are prepared at the same time, parsed, checked, rendered and tokenised, and how
many begin in a second."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.protocol import EngineBusy, Priority
from _mlx_server.inference.scheduler import has_share

# Requests that are prepared at a time, by the priority that their keys allow; those for the highest
# are all prepared at once
PREPARED = {Priority.LOW: 1, Priority.NORMAL: 4, Priority.HIGH: math.inf}
# PDFs that are read at a time, each by a process of its own, and images that are decoded
FILES = {Priority.LOW: 1, Priority.NORMAL: 2, Priority.HIGH: 3}
MAX_WAITING = 64  # for a turn, of each priority; a client that has few of them may add to them
CLIENTS = 1024  # of which it is known when they had their last turn
GAP = 0.002  # seconds between two requests of a kind of which thousands may come
BACKLOG = 600  # such requests, more than there are connections
POLL = 1.0  # seconds between two checks of whether a client that waits is still there


class Turns:
    """Preparing a long prompt takes seconds of Python, which only one thread runs at a time, and
    each of those that want to may keep it for milliseconds. So requests with less important keys
    wait for each other here, and a more important one competes with few of them, however many there
    are. Of clients that may do the same, the next turn is for the one that has had none for
    longest, so that many requests of one hold up no others. `places` is how many have their turn at
    the same time. Any thread may use it."""

    def __init__(self, places: Mapping[Priority, float] = PREPARED) -> None:
        self.lock = threading.Lock()
        self._places = places
        self._waiting: dict[Priority, list[Turn]] = {priority: [] for priority in Priority}
        self._held: collections.Counter[Priority] = collections.Counter()
        self._numbers = itertools.count(1)
        self._latest: BoundedMap[int] = BoundedMap(CLIENTS)  # the number of each client's last turn

    @contextlib.contextmanager
    def take(
        self,
        priority: Priority,
        is_client_gone: Callable[[], bool],
        most: float | None = None,
        client: str = "",
    ) -> Iterator[Turn]:
        """Within it a request of `client` is prepared, whose key allows at most `priority`. Raises
        EngineBusy if `most` wait, by default MAX_WAITING, and the client has its share of them, and
        ClientDisconnected."""
        turn = Turn(self, priority, client, is_client_gone)
        turn.begin(MAX_WAITING if most is None else most)
        try:
            yield turn
        finally:
            turn.end()

    def begin(self, turn: Turn, most: float) -> None:
        """Waits for a place. Raises EngineBusy and ClientDisconnected."""
        with self.lock:
            waiting = self._waiting[turn.priority]
            if not has_share(turn.client, [one.client for one in waiting], most):
                raise EngineBusy("too many requests with such keys are being prepared")
            waiting.append(turn)
            self._let_in(turn.priority)
            try:
                while not turn.held:
                    turn.changed.wait(POLL)
                    if not turn.held and turn.is_client_gone():
                        raise ClientDisconnected
            finally:
                if not turn.held:
                    waiting.remove(turn)

    def end(self, turn: Turn) -> None:
        """Gives a place to who waits."""
        with self.lock:
            turn.held = False
            self._held[turn.priority] -= 1
            self._let_in(turn.priority)

    def _let_in(self, priority: Priority) -> None:
        waiting = self._waiting[priority]
        while waiting and self._held[priority] < self._places[priority]:
            turn = min(waiting, key=lambda one: self._latest.get(one.client) or 0)
            waiting.remove(turn)
            turn.held = True
            turn.changed.notify()
            self._held[priority] += 1
            self._latest.put(turn.client, next(self._numbers))


class Turn:
    """A request's turn, which it may give to others for a while."""

    def __init__(
        self, turns: Turns, priority: Priority, client: str, is_client_gone: Callable[[], bool]
    ):
        self.priority, self.client, self.is_client_gone = priority, client, is_client_gone
        self.held = False  # changed by `Turns`, under its lock
        self.changed = threading.Condition(turns.lock)
        self._turns = turns

    def begin(self, most: float = math.inf) -> None:
        """Waits for it. Raises EngineBusy if `most` do, and ClientDisconnected."""
        self._turns.begin(self, most)

    def end(self) -> None:
        """Ends it, if it has not been given away."""
        if self.held:
            self._turns.end(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the request only waits, for its client or for a process. Leaving raises
        ClientDisconnected."""
        held = self.held
        self.end()
        yield
        if held:
            self.begin()


class Pace:
    """Lets requests begin one after the other, GAP apart. Even those that cost next to nothing hold
    up all others if a hundred threads have such ones without a pause: each of them may run Python
    before a more important one does so again. Any thread may use it."""

    def __init__(self) -> None:
        self.gap = GAP
        self._lock = threading.Lock()
        self._next = 0.0  # when the next one may begin, in monotonic seconds

    def delay(self) -> float:
        """In how many seconds one more request may begin. So many requests as would take longer
        than BACKLOG of them are not there any more."""
        with self._lock:
            now = time.monotonic()
            begin = min(max(now, self._next), now + BACKLOG * self.gap)
            self._next = begin + self.gap
        return begin - now
