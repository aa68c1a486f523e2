"""Stop strings: where the visible text of an answer ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopMatcher:
    """Looks for stop strings in the visible text of one answer.

    `stop_sequence` is the one that was found: the one that completes first, and of several that
    complete together the longest. Each character costs the same, however many stop strings there
    are and however long (https://en.wikipedia.org/wiki/Aho-Corasick_algorithm).

    Internally a state stands for the longest end of the text that begins a stop string; 0 is the
    empty one."""

    def __init__(self, stops: Iterable[str]):
        self.stop_sequence: str | None = None
        self._pending = ""  # text that may be the beginning of a stop string
        self._state = 0
        # By state: the states that characters lead to, the length of what it stands for, the
        # longest stop string that ends there, and the state of its longest proper end.
        self._next: list[dict[str, int]] = [{}]
        self._length, self._stop, self._shorter = [0], [""], [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._length.append(self._length[state] + 1)
                self._stop.append("")
                self._shorter.append(0)
            state = self._next[state][char]
        self._stop[state] = stop

    def _link(self) -> None:
        """Sets `_shorter`, from short to long, and with it the stop strings that are the end of
        something longer."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, longer in self._next[state].items():
                self._shorter[longer] = self._step(self._shorter[state], char)
                self._stop[longer] = self._stop[longer] or self._stop[self._shorter[longer]]
                waiting.append(longer)

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, 0)

    def feed(self, text: str) -> str:
        """Take the next piece of text; returns the text that certainly precedes any stop string,
        all of it when `stop_sequence` is set."""
        if not self._next[0]:
            return text
        before = len(self._pending)
        text = self._pending + text
        for at in range(before, len(text)):
            self._state = self._step(self._state, text[at])
            if stop := self._stop[self._state]:
                self.stop_sequence, self._pending, self._state = stop, "", 0
                return text[: at + 1 - len(stop)]
        certain = len(text) - self._length[self._state]
        self._pending = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that was held back: no more follows that could belong to it."""
        text, self._pending, self._state = self._pending, "", 0
        return text
