"""One answer in the making."""

from __future__ import annotations

import bisect
import collections
import enum
import itertools
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

from _mlx_server.inference.constraint import Constraint
from _mlx_server.inference.formats import OutputFormat
from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.parser import OutputParser
from _mlx_server.inference.prefix_cache import CacheEntry
from _mlx_server.inference.prompt import Prompt
from _mlx_server.inference.protocol import (
    Done,
    EngineError,
    Event,
    Miss,
    Request,
    Text,
    Thinking,
    Tick,
    Token,
    ToolInput,
    Usage,
)
from _mlx_server.inference.renderer import PromptRenderer


class Phase(enum.Enum):
    WAITING = enum.auto()  # for the weights, for memory or for its first chunk
    PREFILL = enum.auto()
    DECODE = enum.auto()
    ENDED = enum.auto()


class Generation:
    """One answer in the making: iterate it for `Event`s, the last of which is `Done`; it raises
    EngineError on failure.

    `prompt_tokens`, `cached_tokens` and `miss` are known at once (the latter two as the cache stood
    at submission; `usage` is exact after the end). `cancel` may be called from any thread, at any
    time, any number of times."""

    TICK = 0.1  # seconds of silence after which the iterator yields a Tick

    def __init__(
        self,
        request: Request,
        local: LocalModel,
        renderer: PromptRenderer,
        prompt: Prompt,
        limit: int,
        by_context: bool,
        mutex: threading.RLock,
    ):
        self.id = secrets.token_hex(12)
        self.request, self.model = request, local
        self.prompt_tokens, self.cached_tokens = len(prompt.tokens), 0
        self.miss: Miss | None = None
        self.usage = Usage(prompt_tokens=len(prompt.tokens))
        self.ending = ""  # once it has ended: the reason, or the error's type
        self._renderer, self._prompt = renderer, prompt
        self._limit, self._by_context = limit, by_context
        # The engine's one lock, with a waiting room of its own
        self._news = threading.Condition(mutex)
        self._outbox: collections.deque[Event | EngineError] = collections.deque()
        self._over = False
        self._cancelled = False
        # From here on the MLX thread's own notes.
        self._phase = Phase.WAITING
        self._line: CacheEntry | None = None
        self._read = prompt.tokens  # and at the end what was written
        self._number = 0
        self._passed_over = 0  # chunks that others have got since its last one
        self._suspect = False  # it was decoding when a step failed, and decodes alone from then on
        self._sampler: Any = None
        self._detokenizer: Any = None
        # What the model wrote, and what of it is text and thinking
        self._raw, self._visible, self._thinking = "", "", ""
        callable_tools = (
            [*request.tools, *request.deferred_tools] if request.tool_choice != "none" else []
        )
        self._grammar = renderer.constraint(request, prompt) if prompt.tokens else None
        self._constraint: Constraint | None = None  # the grammar at work
        format = renderer.format if request.prompt is None else OutputFormat()
        stop = (
            [*request.stop, *renderer.gap_tokens(), "<|endoftext|>"]
            if request.suffix
            else request.stop
        )
        self._parser = OutputParser(
            format,
            callable_tools,
            stop,
            in_thinking=prompt.in_thinking,
            parallel=request.parallel_tool_calls,
        )
        self._pending_logprobs: list[Token] = []  # tokens that may turn out to be visible
        # Tokens of a text read so far, their pooled states, caches
        self._embedded: tuple[int, Any, list[Any]] | None = None
        self._born = self._mark = time.perf_counter()
        self._progress_logged = 0.0  # when it was last logged how far the prompt is

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        with self._news:
            if not self._outbox:
                self._news.wait(self.TICK)
            event = self._outbox.popleft() if self._outbox else Tick()
        self._over = self._over or isinstance(event, (Done, EngineError))
        if isinstance(event, EngineError):
            raise event
        return event

    def text(self) -> Iterator[str]:
        """The visible answer, piece by piece."""
        return (event.text for event in self if isinstance(event, Text))

    def cancel(self) -> None:
        """Ends the generation soon; what it has prefilled stays in the prefix cache."""
        with self._news:
            self._cancelled = self._over = True
            self._outbox.clear()

    def _emit(self, *events: Event | EngineError) -> None:
        for event in events:
            if isinstance(event, Text):
                self._visible += event.text
                event.tokens = self._take_logprobs(event.text) if self._pending_logprobs else []
            else:
                self._pending_logprobs = []
        self._thinking += "".join(event.text for event in events if isinstance(event, Thinking))
        if events:
            with self._news:
                for event in events:
                    self._put_out(event)
                self._news.notify()

    def _put_out(self, event: Event | EngineError) -> None:
        """What continues a piece that nobody has taken yet joins it: who is late gets fewer and
        larger pieces."""
        last = self._outbox[-1] if self._outbox else None
        if type(event) is not type(last) or not isinstance(event, (Text, Thinking, ToolInput)):
            self._outbox.append(event)
        elif isinstance(event, ToolInput):
            last.json += event.json
        else:
            last.text += event.text
            if isinstance(event, Text):
                last.tokens += event.tokens

    def _left(self) -> int:
        """Tokens of the prompt that are still to be prefilled, as far as one can tell. The last one
        is the decoder's."""
        read = (
            len(self._line.tokens)
            if self._line
            else self._embedded[0]
            if self._embedded
            else self.cached_tokens
        )
        return len(self._prompt.tokens) - 1 - read

    def _take_logprobs(self, text: str) -> list[Token]:
        """Takes the tokens that a piece of visible text was made of; what lies before them was
        markup or blanks. All of them where the text is not made of their bytes, as with half a
        character."""
        wanted, told = text.encode(), self._pending_logprobs
        start = b"".join(token.bytes for token in told).find(wanted)
        ends = list(itertools.accumulate(len(token.bytes) for token in told))
        last = bisect.bisect_left(ends, start + len(wanted)) + 1 if start >= 0 else len(told)
        self._pending_logprobs = told[last:]
        return told[bisect.bisect_right(ends, start) : last]

    def _lap(self) -> float:
        """Seconds since the last lap."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def _fail(self, error: EngineError) -> None:
        self._phase, self.ending = Phase.ENDED, type(error).__name__
        self._emit(error)

    def _finish(self, reason: str) -> None:
        self._phase = Phase.ENDED
        self.usage.total_seconds = time.perf_counter() - self._born
        if reason == "stop" and self._parser.stop_sequence is not None:
            reason = "stop_sequence"
        elif reason == "stop" and self._parser.called:
            reason = "tool_calls"
        elif reason == "length" and self._by_context:
            reason = "context"
        self.ending = "cancelled" if self._cancelled else reason
        self._emit(Done(reason, self.usage, self._parser.stop_sequence, self._read))
