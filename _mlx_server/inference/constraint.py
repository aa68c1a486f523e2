"""Logits processors that hold an answer to a grammar or its thinking to a budget."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any


class Constraint:
    """A logits processor that keeps one answer within a grammar; after the grammar's end only the
    turn's end is left.

    `begins` is how many of the answer's tokens precede the text that is held: None as long as the
    model thinks, and for calls. `exits` are tokens that lead out of the grammar where that text
    could begin: into thinking (if True), which ends with the tokens `thinking_end`, or to where
    nothing is held any more. `blanks` may precede the text. With an `opener` only what follows
    these tokens is held, each time they come, up to the grammar's end.

    To be held, a token must be known before the next one is picked, and the model waits for that.
    What is awaited, the end of the thinking or an opener, costs no such wait: there the mask
    depends on the token that is still being computed."""

    def __init__(
        self,
        matcher: Any,
        begins: int | None = None,
        exits: dict[int, bool] | None = None,
        thinking_end: Sequence[int] = (),
        blanks: Sequence[int] = (),
        opener: Sequence[int] = (),
    ):
        self._matcher, self._opened, self._begins, self._exits = (
            matcher,
            matcher,
            begins,
            exits or {},
        )
        self._blanks, self._opener = blanks, list(opener)
        # The tokens from which on the answer is held
        self._awaited = self._opener or list(thinking_end)
        self._state = "waiting" if opener or begins is None and thinking_end else "held"
        self._length = 0  # of the answer as far as it was read
        self._latest: list[int] = []
        self._started = False
        self._first: Any = None  # the mask right behind what is awaited

    def after(self, answer: Sequence[int]) -> Constraint:
        """A copy to go on with behind what is already written of the answer."""
        new = copy.copy(self)
        new._matcher = self._matcher.deep_copy()
        for token in answer:
            new._read(token)
        return new

    @property
    def error(self) -> str:
        """What made the matcher give up, which ends the turn: a grammar may outgrow llguidance's
        limits. Or ""."""
        return grammar_error(self._matcher) if self._matcher.is_error() else ""

    def take(self, token: int, before: int) -> bool:
        """Must be told each token of the answer and how many precede it, before the next call;
        returns whether the text that is held opens with it."""
        if before == self._length:
            self._read(token)
        return self._begins == before and token not in self._exits and token not in self._blanks

    def __call__(self, context: Any, logits: Any) -> Any:
        """The logits (1, vocabulary) with all tokens ruled out that may not follow the tokens
        `context`. On the MLX thread."""
        import mlx.core as mx

        token, fresh, self._started = context[-1:], self._started, True
        if self._state == "waiting":
            *known, last = self._awaited
            if not fresh or self._latest[len(self._latest) - len(known) :] != known:
                return logits
            if self._first is None:
                exits = [token for token, thinks in self._exits.items() if not thinks]
                self._first = self._mask(self._opened, exits, logits.shape[-1])
            return mx.where(mx.logical_or(token != last, self._first), logits, -math.inf)
        if fresh and self._state == "held":
            mx.async_eval(token)
            mx.async_eval(logits)  # the model computes while the mask is made
            self._read(token.item())
        if self._state != "held":
            return logits
        # Thinking is not begun merely because all else is ruled out.
        exits = (
            [
                token
                for token, thinks in self._exits.items()
                if not thinks or token == mx.argmax(logits).item()
            ]
            if self._length == self._begins
            else []
        )
        return mx.where(self._mask(self._matcher, exits, logits.shape[-1]), logits, -math.inf)

    @staticmethod
    def _mask(matcher: Any, exits: Sequence[int], vocabulary: int) -> Any:
        import mlx.core as mx

        mask = bytearray(matcher.compute_bitmask().ljust(vocabulary // 8 + 1, b"\0"))
        for token in exits:
            mask[token // 8] |= 1 << token % 8
        bits = mx.array(memoryview(mask))[:, None] >> mx.arange(8, dtype=mx.uint8) & 1
        return bits.reshape(1, -1)[:, :vocabulary].astype(mx.bool_)

    def _read(self, token: int) -> None:
        beginning = self._begins == self._length
        self._length += 1
        if self._state == "waiting":
            self._latest = [*self._latest, token][-len(self._awaited) :]
            if self._latest == self._awaited:
                self._state, self._matcher = "held", self._opened.deep_copy()
                if not self._opener:
                    self._begins = self._length
                    self._exits = {
                        token: thinks for token, thinks in self._exits.items() if not thinks
                    }
        elif beginning and token in self._exits:
            self._state, self._begins = "waiting" if self._exits[token] else "free", None
        elif self._state == "held":
            self._matcher.consume_token(token)
            if beginning and token in self._blanks:
                self._begins = self._length
            if self._opener and self._matcher.is_accepting():
                self._state, self._latest = "waiting", []


class ThinkingBudget:
    """A logits processor that lets one answer think for `budget` tokens; after those only the
    thinking's end is left.

    The answer begins behind the first `prompt` tokens of the context. Its thinking stands between
    the tokens `start`, none if the prompt ends inside it, and `end`, or a `call`, which may begin
    inside thinking. Thinking that has not begun when the budget would be spent is not expected any
    more."""

    def __init__(
        self,
        budget: int,
        prompt: int,
        start: Sequence[int],
        end: Sequence[int],
        call: Sequence[int],
    ):
        self._budget, self._prompt = budget, prompt
        self._start, self._end, self._call = list(start), list(end), list(call)
        self._over = False

    def __call__(self, context: Any, logits: Any) -> Any:
        """The logits (1, vocabulary) behind the tokens `context`. Reads those, which makes the
        model wait, only from the moment on when the budget may be spent. On the MLX thread."""
        import mlx.core as mx

        written = context.shape[0] - self._prompt
        if self._over or written < self._budget:
            return logits
        answer = context[self._prompt :].tolist()
        begin = _find(answer, self._start)
        if begin < 0:
            self._over = written > self._budget + len(self._start)
            return logits
        thought = answer[begin + len(self._start) :]
        self._over = _find(thought, self._end) >= 0 or _find(thought, self._call) >= 0
        if self._over or len(thought) < self._budget:
            return logits
        done = next(
            n
            for n in range(len(self._end) - 1, -1, -1)
            if thought[len(thought) - n :] == self._end[:n]
        )
        return mx.where(mx.arange(logits.shape[-1]) == self._end[done], logits, -math.inf)


def _find(tokens: list[int], wanted: list[int]) -> int:
    """Where `wanted` first stands among `tokens`, or -1."""
    last = len(tokens) - len(wanted)
    return next((at for at in range(last + 1) if tokens[at : at + len(wanted)] == wanted), -1)


def grammar_error(matcher: Any) -> str:
    """llguidance's reason in one line, without its dump of the grammar and the parser's state."""
    reason = matcher.get_error().rpartition("failed to compile JSON schema: ")[2]
    return " ".join(re.split(r"\n +\d+ \||\n<state>", reason)[0].split())
