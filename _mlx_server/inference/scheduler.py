"""Whose turn it is."""

from __future__ import annotations

from _mlx_server.inference.generation import Generation


class Scheduler:
    """Who gets the next chunk of prefill, and when those who decode get their tokens.

    The highest priority goes first, and lower work keeps what it has and waits. Among equals it is
    the one with the least left to read, by powers of two, so that a short prompt does not wait for
    a long one; of about the same, the first that came. The oldest request is never passed over more
    than `PATIENCE` times in a row. While anyone decodes, prefill takes at most half of the time, a
    quarter if it is of lower priority, and all it needs if it is of higher."""

    PATIENCE = 3

    def __init__(self) -> None:
        self._owed = 0.0  # seconds that the decoding requests have a right to before the next chunk

    def choose(self, candidates: list[Generation], decoding: list[Generation]) -> Generation | None:
        """The request whose chunk is next, or None if those who decode are to go on."""
        if not candidates:
            return None
        highest = min(job.request.priority for job in candidates)
        equals = [job for job in candidates if job.request.priority == highest]
        chosen = min(equals, key=lambda job: (max(0, job._left()).bit_length(), job._born))
        oldest = min(equals, key=lambda job: job._born)
        if oldest._passed_over >= self.PATIENCE:
            chosen = oldest
        if self._owed > 0 and decoding and highest >= min(job.request.priority for job in decoding):
            return None
        for job in equals:
            job._passed_over = 0 if job is chosen else job._passed_over + 1
        return chosen

    def prefilled(self, job: Generation, seconds: float, decoding: list[Generation]) -> None:
        """Takes note of a chunk's time."""
        lower = bool(decoding) and job.request.priority > min(
            other.request.priority for other in decoding
        )
        self._owed = seconds * (3 if lower else 1) if decoding else 0.0

    def decoded(self, seconds: float) -> None:
        self._owed -= seconds
