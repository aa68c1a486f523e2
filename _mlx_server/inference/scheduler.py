"""Which request gets the next chunk of prefill."""

from __future__ import annotations

from dataclasses import dataclass

from _mlx_server.inference.sequence import Sequence


@dataclass
class StepInput:
    """What callers want of a step: the requests that wait, in the order they came, and those that
    are cancelled."""

    waiting: list[Sequence]
    cancelled: list[Sequence]


class Scheduler:
    """Chooses whose chunk of prefill is next, and when the decoding requests get their tokens.

    The highest priority goes first; lower work keeps what it has and waits. Among equals it is the
    request with the least left to read, by powers of two, so that a short prompt does not wait for
    a long one; of about the same, the first that came. The oldest request is never passed over more
    than `PATIENCE` times in a row. While any request decodes, prefill takes at most half of the
    time, a quarter if it is of lower priority, and all it needs if it is of higher."""

    PATIENCE = 3

    def __init__(self) -> None:
        self._owed = 0.0  # seconds of decoding that are due before the next chunk

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

    def prefilled(self, sequence: Sequence, seconds: float, decoding: list[Sequence]) -> None:
        """Takes note of how long a chunk has taken."""
        priorities = [other.request.priority for other in decoding]
        lower = bool(priorities) and sequence.request.priority > min(priorities)
        self._owed = seconds * (3 if lower else 1) if decoding else 0.0

    def decoded(self, seconds: float) -> None:
        """Takes note of how long a step of decoding has taken."""
        self._owed -= seconds
