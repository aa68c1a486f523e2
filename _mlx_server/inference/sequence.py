"""One request on its way through the engine, as the MLX thread sees it."""

from __future__ import annotations

import bisect
import enum
import itertools
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.cache.prefix_cache import CacheEntry
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.event_queue import EventQueue
from _mlx_server.inference.prompt.conversations import Call
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.protocol import (
    Done,
    EngineError,
    Event,
    Request,
    Text,
    Thinking,
    Token,
    ToolEnd,
    ToolStart,
    Totals,
    Usage,
)

if TYPE_CHECKING:
    import mlx.core as mx

    from _mlx_server.inference.constrained.constraint import Constraint
    from _mlx_server.inference.decoding.embedding import Pooler
    from _mlx_server.inference.prompt.renderer import PromptRenderer


class State(enum.Enum):
    """Where a sequence is. It goes from top to bottom; one that has to make room, or whose batch
    has failed, goes from DECODE back to WAITING."""

    WAITING = enum.auto()  # for the weights, for memory or for its first chunk
    PREFILL = enum.auto()
    DECODE = enum.auto()
    ENDED = enum.auto()


class Sequence:
    """One request: its prompt, its KV state, what it has written so far.

    The MLX thread owns it from the moment it is queued. Other threads only read `state`, `usage`
    and the counts, each a single attribute that is replaced as a whole.

    `prompt.tokens` are what is to be read before the first new token is picked: the request's
    prompt and, after a pause, what was already written. `prompt_tokens` counts the request's prompt
    alone. `limit` is the most tokens of the answer; `limited_by_context` says that the context
    window sets that limit and not the request. `cached_tokens` is how much of the prompt was found
    in the prefix cache at submission."""

    def __init__(
        self,
        request: Request,
        local: LocalModel,
        renderer: PromptRenderer,
        prompt: Prompt,
        limit: int,
        limited_by_context: bool,
        events: EventQueue,
    ):
        self.id = secrets.token_hex(12)
        self.request, self.model, self.renderer, self.prompt = request, local, renderer, prompt
        self.limit, self.limited_by_context = limit, limited_by_context
        self.prompt_tokens, self.cached_tokens = len(prompt.tokens), 0
        self.usage = Usage(prompt_tokens=self.prompt_tokens)
        self.state = State.WAITING
        self.ending = ""  # once it has ended: the reason, or the error's type
        self.tokens = prompt.tokens  # at the end with those of the answer behind them
        self.submitted = time.perf_counter()

        # Prefill
        self.entry: CacheEntry | None = None  # the KV state; the decode batch holds its layers
        self.pooler: Pooler | None = None  # instead of `entry` for a text to embed
        self.searched = -1  # version of the prefix cache in which its prompt was looked up last
        self.passed_over = 0  # chunks that others have got since its last one
        self.progress_logged = 0.0  # perf_counter of the last log line on its progress

        # Decode
        self.number = 0  # in the decode batch, once it has been there
        self.alone = False  # its batch has failed once: from then on it decodes by itself
        self.sampler: Callable[[mx.array], mx.array] | None = None
        self.grammar = renderer.constraint(request, prompt) if prompt.tokens else None
        self.constraint: Constraint | None = None  # the grammar, applied to this answer
        self.drafters = renderer.drafters(request, prompt)

        # Output
        self.detokenizer: Any = None
        self.raw, self.visible, self.thinking = "", "", ""  # all text, and two parts of it
        self.calls: list[Call] = []
        self.thinking_ended = False  # for the model, which had ended its turn inside of it
        self.parser = renderer.parser(request, prompt)
        self._events = events
        self._pending_logprobs: list[Token] = []  # of tokens that may turn out to be visible
        self._lap_start = self.submitted
        self._counted = (0, 0, 0, 0, 0)  # what of `usage` is in the engine's totals

    def parse(self, piece: str, token: int) -> list[Event]:
        """The events that a token's text leads to. `piece` is that text, behind text of earlier
        tokens that was held back."""
        control = self.renderer.control_tokens.get(token)
        if control is None or control not in piece:
            return self.parser.feed(piece)
        before, _, behind = piece.rpartition(control)
        events = self.parser.feed(before)
        events += self.parser.feed(control, markup=True)
        return events + self.parser.feed(behind)

    @property
    def cancelled(self) -> bool:
        """Whether the caller does not want the answer any more."""
        return self._events.cancelled

    @property
    def decoding(self) -> bool:
        """Whether it is in the decode batch."""
        return self.state is State.DECODE

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be prefilled, before it is admitted by estimate.
        The last token is not among them: the decode batch reads it."""
        if self.entry is not None:
            read = len(self.entry.tokens)
        elif self.pooler is not None:
            read = self.pooler.length
        else:
            read = self.cached_tokens
        return len(self.prompt.tokens) - 1 - read

    @property
    def length(self) -> int:
        """Tokens of its state, from any thread."""
        usage = self.usage
        length = usage.cached_tokens + usage.prefilled_tokens + usage.completion_tokens
        return min(length, self.prompt_tokens + usage.completion_tokens)

    def tokens_read(self, tokens: list[int]) -> list[int]:
        """The tokens that were read in the decode batch, which knows those of images in another
        form."""
        if not self.prompt.images:
            return tokens
        known = self.prompt.tokens[: len(tokens)]
        return known + tokens[len(known) :]

    def count(self, totals: Totals) -> None:
        """Adds to the totals what was done since the last time, and its end if it has ended."""
        usage, (cached, prefilled, completion, passes, images) = self.usage, self._counted
        self._counted = (
            usage.cached_tokens,
            usage.prefilled_tokens,
            usage.completion_tokens,
            usage.decode_passes,
            usage.images_read,
        )
        totals.cached_tokens += usage.cached_tokens - cached
        totals.prefilled_tokens += usage.prefilled_tokens - prefilled
        totals.completion_tokens += usage.completion_tokens - completion
        totals.decode_passes += usage.decode_passes - passes
        totals.images_read += usage.images_read - images
        if self.state is State.ENDED:
            totals.endings[self.ending] += 1
            totals.prompt_tokens += self.prompt_tokens
            totals.draft_tokens.update(usage.draft_tokens)
            totals.accepted_tokens.update(usage.accepted_tokens)

    def enter(self, state: State) -> None:
        """The one place where the state changes."""
        self.state = state

    def lap(self) -> float:
        """Seconds since the last lap, the first of which begins at submission."""
        before, self._lap_start = self._lap_start, time.perf_counter()
        return self._lap_start - before

    @property
    def lap_start(self) -> float:
        """When the current lap began, by `time.perf_counter`."""
        return self._lap_start

    # -- what goes to the caller

    def emit(self, *events: Event) -> None:
        """Sends events to the caller."""
        for event in events:
            if isinstance(event, Text):
                self.visible += event.text
                event.tokens = self._take_logprobs(event.text) if self._pending_logprobs else []
            else:
                self._pending_logprobs = []
            if isinstance(event, Thinking):
                self.thinking += event.text
            elif isinstance(event, ToolStart):
                self.calls.append((event.id, event.name, {}))
            elif isinstance(event, ToolEnd):
                self.calls[-1] = (*self.calls[-1][:2], event.arguments)
        if events:
            self._events.put(*events)

    def add_logprobs(self, token: Token) -> None:
        """Keeps a token's log probabilities until it is known whether the token is visible."""
        self._pending_logprobs.append(token)

    def _take_logprobs(self, text: str) -> list[Token]:
        """The pending tokens that a piece of visible text was made of; those before them were
        markup or blanks. If the text is not made of their bytes, as with half a character, all."""
        wanted, pending = text.encode(), self._pending_logprobs
        start = b"".join(token.bytes for token in pending).find(wanted)
        ends = list(itertools.accumulate(len(token.bytes) for token in pending))
        last = bisect.bisect_left(ends, start + len(wanted)) + 1 if start >= 0 else len(pending)
        self._pending_logprobs = pending[last:]
        return pending[bisect.bisect_right(ends, start) : last]

    def fail(self, error: EngineError) -> None:
        """Ends with an error. The first ending counts."""
        if self.state is not State.ENDED:
            self.enter(State.ENDED)
            self.ending = type(error).__name__
            self._events.put(error)

    def finish(self, reason: str) -> None:
        """Ends well. `reason` is "stop", "length" or "load"; what the output parser and the context
        window know makes it more precise."""
        self.usage.total_seconds = time.perf_counter() - self.submitted
        for drafter in self.drafters:
            if drafter.drafted:
                self.usage.draft_tokens[drafter.name] = drafter.drafted
                self.usage.accepted_tokens[drafter.name] = drafter.accepted
        if reason == "stop" and self.parser.stop_sequence is not None:
            reason = "stop_sequence"
        elif reason == "stop" and self.parser.called:
            reason = "tool_calls"
        elif reason == "length" and self.limited_by_context:
            reason = "context"
        self.ending = "cancelled" if self.cancelled else reason
        self.enter(State.ENDED)
        self.emit(Done(reason, self.usage, self.parser.stop_sequence, self.tokens))
