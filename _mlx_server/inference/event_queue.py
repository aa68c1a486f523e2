"""Events on their way from the MLX thread to the caller's thread."""

from __future__ import annotations

import collections
import threading

from _mlx_server.inference.protocol import EngineError, Event, Text, Thinking, ToolInput


class EventQueue:
    """The events of one request, put in by the MLX thread and taken out by the caller's.

    `mutex` is the engine's one lock; the queue waits on a condition of its own over it."""

    def __init__(self, mutex: threading.RLock):
        self.cancelled = False  # set once, under the lock
        self._arrived = threading.Condition(mutex)
        self._events: collections.deque[Event | EngineError] = collections.deque()

    def put(self, *events: Event | EngineError) -> None:
        """Adds events. One that continues the last event that nobody has taken yet is joined with
        it, so that a slow reader gets fewer and larger pieces."""
        with self._arrived:
            for event in events:
                self._append(event)
            self._arrived.notify()

    def take(self, seconds: float) -> Event | EngineError | None:
        """The next event, waiting at most so long for it; None if none came."""
        with self._arrived:
            if not self._events:
                self._arrived.wait(seconds)
            return self._events.popleft() if self._events else None

    def cancel(self) -> None:
        """Drops all events and tells the MLX thread that nobody waits for more."""
        with self._arrived:
            self.cancelled = True
            self._events.clear()

    def _append(self, event: Event | EngineError) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, ToolInput) and isinstance(last, ToolInput):
            last.json += event.json
        elif isinstance(event, Thinking) and isinstance(last, Thinking):
            last.text += event.text
        elif isinstance(event, Text) and isinstance(last, Text):
            last.text += event.text
            last.tokens += event.tokens
        else:
            self._events.append(event)
