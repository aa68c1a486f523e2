"""Which request is let in next, and which gets the next chunk of prefill."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.protocol import Priority, Request
from _mlx_server.inference.sequence import Sequence


@dataclass
class StepInput:
    """What callers want of a step: the requests that wait, in the order they came, and those that
    are cancelled."""

    waiting: list[Sequence]
    cancelled: list[Sequence]


class Scheduler:
    """Chooses who is let in, whose chunk of prefill is next, and when the decoding requests get
    their tokens.

    The highest priority goes first; lower work keeps what it has and waits. Among equals it is the
    request with the least left to read, by powers of two, so that a short prompt does not wait for
    a long one; of about the same, the first that came. The oldest request is never passed over more
    than `PATIENCE` times in a row. While any request decodes, prefill takes at most half of the
    time, a quarter if it is of lower priority, and all it needs if it is of higher."""

    PATIENCE = 3
    CLIENTS = 1024  # of which it is known when they were let in last

    def __init__(self) -> None:
        self._owed = 0.0  # seconds of decoding that are due before the next chunk
        self._numbers = itertools.count(1)
        # By client, the number of the latest of its requests
        self._let_in: BoundedMap[int] = BoundedMap(self.CLIENTS)

    def admission_order(self, waiting: list[Sequence], running: list[Sequence]) -> list[Sequence]:
        """In which order requests are let in: the highest priority first, of these one whose client
        has the fewest in work or in front of it, then the client that has had none let in for
        longest, and then as they came."""
        owned = Counter(one.request.client for one in running)
        places: dict[Sequence, tuple[int, int, int]] = {}
        for one in waiting:
            client = one.request.client
            places[one] = one.request.priority, owned[client], self._let_in.get(client) or 0
            owned[client] += 1
        return sorted(waiting, key=places.__getitem__)

    def admitted(self, sequence: Sequence) -> None:
        """Takes note of a request that was let in."""
        self._let_in.put(sequence.request.client, next(self._numbers))

    def choose(self, candidates: list[Sequence], decoding: list[Sequence]) -> Sequence | None:
        """The request whose chunk is next; None if the decoding ones are to go on."""
        if not candidates:
            return None
        highest = min(one.request.priority for one in candidates)
        equals = [one for one in candidates if one.request.priority == highest]
        chosen = min(equals, key=lambda one: (max(0, one.left).bit_length(), one.submitted))
        oldest = min(equals, key=lambda one: one.submitted)
        if oldest.passed_over >= self.PATIENCE:
            chosen = oldest
        if self._owed > 0 and decoding and highest >= min(one.request.priority for one in decoding):
            return None
        for one in equals:
            one.passed_over = 0 if one is chosen else one.passed_over + 1
        return chosen

    def prefilled(
        self, sequence: Sequence, read: list[Sequence], seconds: float, decoding: list[Sequence]
    ) -> None:
        """Takes note of how long the chunk of a request has taken, and whose were `read` with
        it."""
        for one in read:
            one.passed_over = 0
        priorities = [other.request.priority for other in decoding]
        lower = bool(priorities) and sequence.request.priority > min(priorities)
        self._owed = seconds * (3 if lower else 1) if decoding else 0.0

    def decoded(self, seconds: float) -> None:
        """Takes note of how long a step of decoding has taken."""
        self._owed -= seconds


def has_place(request: Request, waiting: list[Sequence], most: int) -> bool:
    """Whether a request may join those that wait, where there are `most` places for requests of
    normal priority: fewer for less important ones, so that they cannot take all of them, and a
    share of them for each client, however many requests others have."""
    half = most / 2
    places = {Priority.LOW: half, Priority.NORMAL: 2 * half, Priority.HIGH: 3 * half}
    clients = [one.request.client for one in waiting]
    return has_share(request.client, clients, places[request.priority])


def has_share(client: str, waiting: list[str], places: float) -> bool:
    """Whether one more request of a client may wait where there are so many places: if one is free,
    or the client has less than its share of them. `waiting` are the clients of those that wait."""
    return len(waiting) < places or waiting.count(client) < places / len({client, *waiting})
