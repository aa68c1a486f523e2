"""Events on their way from the MLX thread to the caller's thread."""

from __future__ import annotations

import collections
import threading

from _mlx_server.inference.protocol import EngineError, Event, Text, Thinking, ToolInput


class _Run:
    """An event and the texts of those that go on with it."""

    def __init__(self, event: Event | EngineError):
        self._event = event
        self._more: list[str] = []

    def add(self, event: Event | EngineError) -> bool:
        """Takes an event that goes on with this one; returns whether it does."""
        last = self._event
        if isinstance(event, ToolInput) and isinstance(last, ToolInput):
            self._more.append(event.json)
        elif isinstance(event, Thinking) and isinstance(last, Thinking):
            self._more.append(event.text)
        elif isinstance(event, Text) and isinstance(last, Text):
            self._more.append(event.text)
            last.tokens += event.tokens
        else:
            return False
        return True

    def joined(self) -> Event | EngineError:
        """All as one event."""
        event = self._event
        if isinstance(event, ToolInput):
            event.json = "".join([event.json, *self._more])
        elif isinstance(event, Text | Thinking):
            event.text = "".join([event.text, *self._more])
        return event


class EventQueue:
    """The events of one request, put in by the MLX thread and taken out by the caller's.

    `mutex` is the engine's one lock; the queue waits on a condition of its own over it."""

    def __init__(self, mutex: threading.RLock):
        self.cancelled = False  # set once, under the lock
        self._arrived = threading.Condition(mutex)
        self._runs: collections.deque[_Run] = collections.deque()

    def put(self, *events: Event | EngineError) -> None:
        """Adds events. One that continues the last event that nobody has taken yet is joined with
        it when it is, so that a slow reader gets fewer and larger pieces."""
        with self._arrived:
            for event in events:
                if not self._runs or not self._runs[-1].add(event):
                    self._runs.append(_Run(event))
            self._arrived.notify()

    def take(self, seconds: float) -> Event | EngineError | None:
        """The next event, waiting at most so long for it; None if none came."""
        with self._arrived:
            if not self._runs:
                self._arrived.wait(seconds)
            run = self._runs.popleft() if self._runs else None
        return run.joined() if run else None  # a long one takes its time: not under the lock

    def cancel(self) -> None:
        """Drops all events and tells the MLX thread that nobody waits for more."""
        with self._arrived:
            self.cancelled = True
            self._runs.clear()
