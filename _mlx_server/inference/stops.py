"""Stop strings: where the visible text of an answer ends."""

from __future__ import annotations

from collections.abc import Iterable

from _mlx_server.inference.marks import Marks


class StopMatcher:
    """Looks for stop strings in the visible text of one answer.

    `stop_sequence` is the one that was found: the one that completes first, and of several that
    complete together the longest.
    """

    def __init__(self, stops: Iterable[str]):
        self.stop_sequence: str | None = None
        self._stops = Marks(stops)
        self._pending = ""  # text that may be the beginning of a stop string

    def feed(self, text: str) -> str:
        """Take the next piece of text; returns the text that certainly precedes any stop string,
        all of it when `stop_sequence` is set."""
        text = self._pending + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops.texts
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, certain, self.stop_sequence = min(found)
            self._pending = ""
        else:
            certain = len(text) - self._stops.partial_length(text)
            self._pending = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that was held back: no more follows that could belong to it."""
        text, self._pending = self._pending, ""
        return text
