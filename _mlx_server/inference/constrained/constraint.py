"""Logits processors that hold an answer to a grammar, or its thinking to a budget."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx


class State(Enum):
    """Where an answer is with regard to the grammar."""

    WAITING = auto()  # the text that is held comes later, if at all
    HELD = auto()  # within the grammar
    FREE = auto()  # nothing is held any more


class Constraint:
    """A logits processor that keeps one answer within a grammar. After the grammar's end only the
    turn's end is left.

    `matcher` is llguidance's LLMatcher. `start` is how many of the answer's tokens precede the text
    that is held: None as long as the model thinks, and for calls. `exits` are tokens that lead out
    of the grammar where that text could begin: into thinking (if True), which ends with the tokens
    `thinking_end`, or to where nothing is held any more. The tokens `blanks` may precede the text.
    With a `trigger` only what follows these tokens is held, each time they come, up to the
    grammar's end.

    To be held, a token must be known before the next one is sampled, and the model waits for that.
    What is awaited, the end of the thinking or a trigger, costs no such wait: there the mask
    depends on the token that is still being computed.
    """

    def __init__(
        self,
        matcher: Any,
        start: int | None = None,
        exits: dict[int, bool] | None = None,
        thinking_end: Sequence[int] = (),
        blanks: Sequence[int] = (),
        trigger: Sequence[int] = (),
    ):
        self._initial = (matcher, start, exits, thinking_end, blanks, trigger)
        self._start_matcher = matcher  # stays at the beginning of the grammar
        self._matcher = matcher.deep_copy()
        self._start, self._exits, self._blanks = start, exits or {}, blanks
        self._repeats = bool(trigger)
        self._awaited = list(trigger or thinking_end)  # behind these tokens the grammar begins
        self._latest: list[int] = []  # the answer's last tokens, as many as are awaited
        self._length = 0  # of the answer, as far as it was read
        self._called = False
        self._start_mask: mx.array | None = None
        waits = bool(trigger) or start is None and bool(thinking_end)
        self._state = State.WAITING if waits else State.HELD

    def after(self, answer: Sequence[int]) -> Constraint:
        """A constraint like this one for an answer of which some tokens are already written."""
        new = Constraint(*self._initial)
        for position, token in enumerate(answer):
            new.observe(token, position)
        return new

    @property
    def error(self) -> str:
        """What made the matcher give up, which ends the turn: a grammar may outgrow llguidance's
        limits. Or ""."""
        return grammar_error(self._matcher) if self._matcher.is_error() else ""

    def observe(self, token: int, position: int) -> bool:
        """Must be told each token of the answer and how many precede it, before the next call;
        returns whether the text that is held begins with it."""
        if position == self._length:
            self._read(token)
        is_first = self._start == position
        return is_first and token not in self._exits and token not in self._blanks

    def ahead(self, tokens: Sequence[int]) -> list[Constraint]:
        """A constraint for what comes behind each of some tokens that may come next, up to the
        first of them that may not. This one stays where it is."""
        constraints: list[Constraint] = []
        for token in tokens:
            latest = (constraints or [self])[-1].behind(token)
            if latest.error:
                break
            constraints.append(latest)
        return constraints

    def behind(self, token: int) -> Constraint:
        """A constraint for what comes behind the answer's next token."""
        new = copy.copy(self)
        vars(new).update(_matcher=self._matcher.deep_copy(), _called=False)
        new.observe(token, self._length)
        return new

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """The logits (1, vocabulary) with all tokens ruled out that may not follow the tokens
        `context` (length). On the MLX thread."""
        import mlx.core as mx

        # The first call comes before the answer's first token.
        token, fresh, self._called = context[-1:], self._called, True
        if self._state is State.WAITING:
            return self._mask_if_awaited(token, logits) if fresh else logits
        if fresh and self._state is State.HELD:
            async_eval: Any = mx.async_eval
            async_eval(token)
            async_eval(logits)  # the model computes while the mask is made
            number: Any = token.item()
            self._read(number)
        if self._state is not State.HELD:
            return logits
        exits: list[int] = []
        if self._length == self._start:
            # Thinking is not begun merely because all else is ruled out.
            likeliest = mx.argmax(logits).item() if any(self._exits.values()) else None
            exits = [
                token for token, thinks in self._exits.items() if not thinks or token == likeliest
            ]
        return mx.where(_mask(self._matcher, exits, logits.shape[-1]), logits, -math.inf)

    def _mask_if_awaited(self, token: mx.array, logits: mx.array) -> mx.array:
        """The logits, held to the grammar's beginning if `token`, which need not be computed yet,
        completes what is awaited."""
        import mlx.core as mx

        *known, last = self._awaited
        if self._latest[len(self._latest) - len(known) :] != known:
            return logits
        if self._start_mask is None:
            exits = [token for token, thinks in self._exits.items() if not thinks]
            self._start_mask = _mask(self._start_matcher, exits, logits.shape[-1])
        return mx.where(mx.logical_or(token != last, self._start_mask), logits, -math.inf)

    def _read(self, token: int) -> None:
        """Take the answer's next token. This is where the state changes."""
        at_start = self._start == self._length
        self._length += 1
        if self._state is State.WAITING:
            self._latest = [*self._latest, token][-len(self._awaited) :]
            if self._latest == self._awaited:
                self._enter_grammar()
        elif at_start and token in self._exits:
            self._state = State.WAITING if self._exits[token] else State.FREE
            self._start = None
        elif self._state is State.HELD:
            self._matcher.consume_token(token)
            if at_start and token in self._blanks:
                self._start = self._length
            if self._repeats and self._matcher.is_accepting():
                self._state, self._latest = State.WAITING, []

    def _enter_grammar(self) -> None:
        self._state, self._matcher = State.HELD, self._start_matcher.deep_copy()
        if not self._repeats:  # the thinking is over, and comes once
            self._start = self._length
            self._exits = {token: thinks for token, thinks in self._exits.items() if not thinks}


def _mask(matcher: Any, exits: Sequence[int], vocabulary: int) -> mx.array:
    """The tokens (1, vocabulary) that the matcher allows, and `exits`, as booleans."""
    import mlx.core as mx

    mask = bytearray(matcher.compute_bitmask().ljust(vocabulary // 8 + 1, b"\0"))
    for token in exits:
        mask[token // 8] |= 1 << token % 8
    octets: Any = memoryview(mask)
    bits = mx.array(octets)[:, None] >> mx.arange(8, dtype=mx.uint8) & 1
    return bits.reshape(1, -1)[:, :vocabulary].astype(mx.bool_)


class ThinkingBudget:
    """A logits processor that lets one answer think for `budget` tokens. After those only the
    thinking's end is left.

    The answer begins behind the first `prompt` tokens of the context. Its thinking stands between
    the tokens `start`, none if the prompt ends inside it, and `end`, or a `call`, which may begin
    inside thinking. Thinking that has not begun when the budget would be spent is not expected any
    more.
    """

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
        self._over = False  # whether the thinking has ended, or never began

    def ahead(self, tokens: Sequence[int]) -> list[ThinkingBudget]:
        """A budget for what comes behind each of some tokens that may come next. This one learns
        nothing from them."""
        return [copy.copy(self) for _ in tokens]

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """The logits (1, vocabulary) behind the tokens `context` (length). Reads those, which makes
        the model wait, only from the moment on when the budget may be spent. On the MLX thread."""
        import mlx.core as mx

        length = context.shape[0] - self._prompt
        if self._over or length < self._budget:
            return logits
        answer: Any = context[self._prompt :].tolist()
        start = _find(answer, self._start)
        if start < 0:
            self._over = length > self._budget + len(self._start)
            return logits
        thinking = answer[start + len(self._start) :]
        self._over = _find(thinking, self._end) >= 0 or _find(thinking, self._call) >= 0
        if self._over or len(thinking) < self._budget:
            return logits
        # How many tokens of the end are already there
        done = next(
            count
            for count in range(len(self._end) - 1, -1, -1)
            if thinking[len(thinking) - count :] == self._end[:count]
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
