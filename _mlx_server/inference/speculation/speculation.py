"""Several tokens a pass: speculative decoding.

The model reads the pending token together with a draft of what follows it. A token of the draft
counts only if plain decoding would have picked it at its place, so the answer is the one without
speculation, whether it is greedy, sampled, penalised or held to a grammar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from _mlx_server.inference.speculation.head_drafter import NAME, prepare_head
from _mlx_server.inference.speculation.pass_costs import PassCosts
from _mlx_server.inference.speculation.rollback import Rollback, Unsupported

if TYPE_CHECKING:
    import mlx.core as mx

log = logging.getLogger("mlx_server")


class Drafter(Protocol):
    """Guesses the next tokens of one request, from whatever it keeps of the request for itself.
    `drafted` and `accepted` count tokens, `name` says in figures who has drafted them."""

    name: str
    drafted: int
    accepted: int

    def follow(self, tokens: Sequence[int], pending: int | None = None) -> None:
        """Takes note of all tokens that were read so far, the prompt's first, and of the one that
        was picked behind them, if it is known."""

    def chances(self) -> list[float]:
        """Of each token that it can draft now: how likely it is right if all before are."""

    def draft(self, row: Any, length: int) -> list[int]:
        """The next tokens behind the pending one, as many as asked for, which are not more than
        there are chances. `row` is the request's in the decode batch."""


@dataclass
class _Draft:
    """The pending token and a draft of those behind it, and for each of them the logits processors
    of what comes next."""

    drafter: Drafter
    tokens: list[int]
    processors: list[tuple[Any, ...]]


@dataclass
class _Block:
    """What a pass has brought: the tokens it has read that count, what was picked behind each of
    them, and the log-probabilities (vocabulary) of that. `taken` tokens were handed out."""

    row: Any
    drafter: Drafter
    tokens: list[int]
    picks: list[int]
    logprobs: list[mx.array]
    taken: int = 0


class Speculation:
    """Speculative decoding of one request at a time, which decodes on its own caches in a
    `RowGroup`, its `row`. On the MLX thread.

    The caches hold more than what counts between `step` and `settle`: that takes them back to the
    tokens that were taken. Nobody may look at the row in between.

    There are no drafts until it is known what passes cost. That is measured a pass at a time, by
    `measure`, as long as it is `unmeasured`."""

    def __init__(
        self,
        model: Any,
        rollback: Rollback,
        costs: PassCosts,
        ends: Iterable[int],
        measuring: Iterable[None] = (),
    ):
        """Each item of `measuring` is a pass that makes `costs` known."""
        self._model, self.rollback, self.costs = model, rollback, costs
        self._ends, self._measuring = frozenset(ends), iter(measuring)
        self.unmeasured = not costs.known
        self._block: _Block | None = None
        self._known: Any = None  # the row whose pending token is known without waiting for it
        self._began = 0.0  # when the last step began, if its time says something
        self._rows = 0  # tokens that it has read

    @classmethod
    def of(
        cls, name: str, model: Any, new_cache: Callable[[], list[Any]], ends: Iterable[int]
    ) -> Speculation | None:
        """Speculation for a model that has just been loaded, or None, with a line in the log, if
        its caches cannot be taken back."""
        try:
            rollback = Rollback(model, new_cache())
        except Unsupported as reason:
            log.info("%s decodes without speculation: %s", name, reason)
            return None
        costs, drafters = PassCosts(), {}

        def read(rows: int) -> None:
            import mlx.core as mx

            mx.eval(model(mx.zeros((1, rows), mx.int32), cache=new_cache()))

        if hasattr(model, "mtp"):
            drafters[NAME] = lambda: prepare_head(model, new_cache())
        return cls(model, rollback, costs, ends, costs.measure(read, drafters))

    def measure(self) -> None:
        """A pass of those by which costs are measured. If one fails, they stay unknown."""
        more, self._began = False, 0.0
        try:
            more = next(self._measuring, self) is None
        finally:
            self.unmeasured = more

    def step(self, row: Any, drafters: Sequence[Drafter]) -> list[Any]:
        """The row's next tokens, one or several, as mlx-lm's responses. The last token of an answer
        comes alone. Each is to be taken, as long as the answer goes on, and then settled."""
        now, follows = time.perf_counter(), self._known is not row
        if self._began:
            self.costs.note(self._rows, len(row.tokens[0]), now - self._began)
        self._began, self._rows = now if follows else 0.0, 1
        draft = self._draft(row, drafters)
        if draft is not None:
            return self._verify(row, draft)
        self._known = None
        responses: list[Any] = row.next()
        return responses

    def take(self) -> None:
        """The next token of the last step was taken."""
        if self._block is not None:
            self._block.taken += 1

    def settle(self) -> None:
        """Takes the row back to the tokens that were taken."""
        import mlx.core as mx

        block, self._block = self._block, None
        if block is None:
            return
        row, taken = block.row, max(1, block.taken)
        self.rollback.keep(taken)
        tokens = block.tokens[:taken]
        block.drafter.accepted += taken - 1
        row.advance(tokens, block.picks[taken - 1], block.logprobs[taken - 1])
        if hasattr(row.samplers[0], "place"):
            row.samplers[0].place += taken
        async_eval: Any = mx.async_eval
        async_eval([layer.state for layer in row.prompt_cache])
        self._known = row

    def drop(self) -> None:
        """Forgets the row, which is in use no more."""
        self._block = self._known = None
        self._began, self._rows = 0.0, 1

    @property
    def drafting(self) -> bool:
        """Whether the last step has read a draft, or has failed to."""
        return self._rows > 1

    # -- drafting

    def _draft(self, row: Any, drafters: Sequence[Drafter]) -> _Draft | None:
        """The row's pending token with a draft of what follows it; None to decode plainly. As long
        as no draft is worth it, the pending token is not waited for: meanwhile the model computes
        the next one."""
        tokens, sampler = row.tokens[0], row.samplers[0]
        if not self.costs.known:
            return None
        if not hasattr(sampler, "pick") and not _is_greedy(sampler):
            return None
        for drafter in drafters:
            drafter.follow(tokens)
        if self._known is not row and self._best(drafters, len(tokens)) is None:
            return None
        pending = row.upcoming(0).token
        for drafter in drafters:
            drafter.follow(tokens, pending)
        best = self._best(drafters, len(tokens))
        if best is None or pending in self._ends:
            return None
        drafter, length = best
        length = min(length, row.left() - 2)  # an answer's last token is left to a step of its own
        if length < 1:
            return None
        started = time.perf_counter()
        drafted = drafter.draft(row, length)
        self.costs.note_draft(drafter.name, length, time.perf_counter() - started)
        return self._allowed(row, drafter, [pending, *drafted])

    def _best(self, drafters: Sequence[Drafter], context: int) -> tuple[Drafter, int] | None:
        """The drafter of which most is expected, and how many tokens it should draft; None if no
        draft is worth it."""
        best, most = None, 0.0
        for drafter in drafters:
            length, gain = self.costs.best_draft(drafter.chances(), context, drafter.name)
            if length and gain > most:
                best, most = (drafter, length), gain
        return best

    def _allowed(self, row: Any, drafter: Drafter, tokens: list[int]) -> _Draft | None:
        """The pending token and what of the drafted ones may follow it: not an end."""
        ends = (at for at, token in enumerate(tokens) if token in self._ends)
        tokens = tokens[: next(ends, None)]
        processors = []
        for processor in row.logits_processors[0]:
            behind = getattr(processor, "ahead", None)
            processors.append(behind(tokens) if behind else [processor] * len(tokens))
        length = min(map(len, processors), default=len(tokens))
        if length < 2:
            return None
        return _Draft(drafter, tokens[:length], list(zip(*processors, strict=False)))

    # -- a pass

    def _verify(self, row: Any, draft: _Draft) -> list[Any]:
        """Reads a draft. Behind each of its tokens the model picks as if it had decoded plainly up
        to there; the draft counts as far as it is what was picked."""
        import mlx.core as mx

        tokens = draft.tokens
        self._began, self._rows = time.perf_counter(), len(tokens)
        self.rollback.begin(row.prompt_cache, len(tokens))
        logits = self._model(mx.array([tokens]), cache=row.prompt_cache)[0]
        if draft.processors:
            logits = _processed(row, draft, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sampler = row.samplers[0]
        pick = getattr(sampler, "pick", None)
        picked = pick(logprobs, sampler.place) if pick else sampler(logprobs)
        mx.eval(picked, logprobs)
        picks: list[int] = picked.tolist()
        count = 1
        while count < len(tokens) and tokens[count] == picks[count - 1]:
            count += 1
        draft.drafter.drafted += len(tokens) - 1
        rows = [row.upcoming(0).logprobs, *(logprobs[at] for at in range(count))]
        self._block = _Block(row, draft.drafter, tokens[:count], picks[:count], rows[1:])
        return [
            row.Response(row.uids[0], token, rows[at], None, None, None)
            for at, token in enumerate(tokens[:count])
        ]


def _processed(row: Any, draft: _Draft, logits: mx.array) -> mx.array:
    """The logits (length, vocabulary) as the row's processors change those of each token."""
    import mlx.core as mx

    before = row.context()
    context = mx.concatenate([before, mx.array(draft.tokens, before.dtype)])
    rows = []
    for at, processors in enumerate(draft.processors):
        changed = logits[at : at + 1]
        for processor in processors:
            changed = processor(context[: before.size + at + 1], changed)
        rows.append(changed)
    return mx.concatenate(rows)


def _is_greedy(sampler: Any) -> bool:
    from mlx_lm.sample_utils import greedy_sampler

    return sampler is greedy_sampler
