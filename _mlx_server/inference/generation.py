"""One answer in the making, as the caller sees it."""

from __future__ import annotations

from collections.abc import Iterator

from _mlx_server.inference.event_queue import EventQueue
from _mlx_server.inference.protocol import Done, EngineError, Event, Miss, Text, Tick
from _mlx_server.inference.sequence import Sequence


class Generation:
    """One answer in the making: iterate it for `Event`s, the last of which is `Done`; it raises
    EngineError on failure.

    `prompt_tokens`, `cached_tokens` and `miss` are known at once (the latter two as the cache was
    at submission). `usage` counts along and is exact after the end. `sequence` is what the MLX
    thread knows of the request: to look at, not to change. `cancel` may be called from any thread,
    at any time, any number of times."""

    TICK = 0.1  # seconds of silence after which the iterator yields a Tick

    def __init__(self, sequence: Sequence, events: EventQueue):
        self.id, self.request, self.model = sequence.id, sequence.request, sequence.model
        self.prompt_tokens, self.cached_tokens = sequence.prompt_tokens, sequence.cached_tokens
        self.usage, self.sequence = sequence.usage, sequence
        self.miss: Miss | None = None  # set before the engine hands the generation out
        self._events = events
        self._over = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        event = self._events.take(self.TICK) or Tick()
        self._over = self._over or isinstance(event, Done | EngineError)
        if isinstance(event, EngineError):
            raise event
        return event

    def text(self) -> Iterator[str]:
        """The visible answer, piece by piece."""
        return (event.text for event in self if isinstance(event, Text))

    def cancel(self) -> None:
        """Ends the generation soon; what it has prefilled stays in the prefix cache."""
        self._over = True
        self._events.cancel()
