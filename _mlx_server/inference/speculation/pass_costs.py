"""What a pass of the model costs, by how many tokens it reads."""

from __future__ import annotations

import collections
import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

ROWS = (1, 2, 3, 4, 8, 16, 32)  # tokens of the passes that are told apart
WIDEST = ROWS[-1] - 1  # tokens of a draft


class PassCosts:
    """How long passes of one model take on this machine, measured once it is loaded, while nobody
    waits, and corrected by the passes of real requests between requests: within one, what is
    decided depends on tokens alone. On the MLX thread."""

    GAIN = 1.05  # tokens in the time of one, below which a draft is not worth it
    RUNS = 3  # of which the fastest counts
    SLOW = 0.1  # seconds behind which no further one begins
    SAMPLES = 64  # passes of a kind that are kept
    FEW = 5  # passes of a kind that say nothing yet

    def __init__(self, seconds: Mapping[int, float] | None = None):
        """`seconds` that passes take which read as many tokens as some of `ROWS` say, the first and
        the last of which must be there, in a short context. Without them no cost is known until all
        of them have been measured."""
        self._measured = dict(seconds or {})
        self._table: dict[tuple[int, int], float] = {}
        self._drafting: dict[str, float] = {}  # seconds of a drafter for a token
        self._noted: dict[tuple[int, int], collections.deque[float]] = {}
        self._drafts: dict[str, collections.deque[float]] = {}

    @property
    def known(self) -> bool:
        """Whether anything can be asked of them."""
        return bool(self._measured)

    def measure(
        self,
        read: Callable[[int], object],
        drafters: Mapping[str, Callable[[], Callable[[], object]]],
    ) -> Generator[None, None, None]:
        """Measures them, in steps of a pass each; they are known with the last one. `read` reads so
        many tokens in a short context. What the function of a drafter returns drafts a token."""
        measured = {}
        for rows in ROWS:
            if rows != 3:  # of a few tokens, those are known between which it lies
                measured[rows] = yield from self._fastest(functools.partial(read, rows))
        for name, prepare in drafters.items():
            yield
            self._drafting[name] = yield from self._fastest(prepare())
        self._measured = measured

    def _fastest(self, run: Callable[[], object]) -> Generator[None, None, float]:
        seconds: list[float] = []
        while len(seconds) < self.RUNS and sum(seconds) < self.SLOW:  # the first compiles kernels
            yield
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    @property
    def tokens_in_a_pass(self) -> float:
        """How many tokens more a pass reads in the time that one of a single token takes."""
        more = (self._measured[ROWS[-1]] - self._measured[1]) / (ROWS[-1] - 1)
        return self._measured[1] / more if more > 0 else math.inf

    def _one(self, context: int) -> float:
        """Seconds of a pass that reads a single token."""
        return self._table.get((1, _depth(context)), self._measured[1])

    def cost(self, rows: int, context: int) -> float:
        """What a pass that reads so many tokens behind `context` others costs, as a multiple of one
        that reads a single token."""
        depth = _depth(context)
        one = self._table.get((1, depth))
        wider = [known for known in ROWS if known >= rows]  # no pass costs more than a wider one
        real = [self._table[known, depth] for known in wider if (known, depth) in self._table]
        if one and real:
            return max(1.0, min(real) / one)
        seconds = min(self._measured[known] for known in wider if known in self._measured)
        return max(1.0, seconds / self._measured[1])

    def best_draft(
        self, chances: Sequence[float], context: int, drafter: str = ""
    ) -> tuple[int, float]:
        """How many tokens a drafter's draft should have, 0 for none, and the gain that is expected
        of it: the tokens of the next pass in the time of one. `chances` are those of each token to
        be right if all before it are."""
        best, gain = 0, self.GAIN
        effort = self._drafting.get(drafter, 0.0) / self._one(context)
        expected, chance = 1.0, 1.0
        lengths = {*(rows - 1 for rows in ROWS), len(chances)}
        for length, next_chance in enumerate(chances[:WIDEST], 1):
            chance *= next_chance
            expected += chance
            if length not in lengths:
                continue
            worth = expected / (self.cost(length + 1, context) + length * effort)
            if worth > gain:
                best, gain = length, worth
        return best, gain

    def note(self, rows: int, context: int, seconds: float) -> None:
        """A pass of a request has taken so long, with all that belongs to its tokens."""
        if rows in ROWS:
            kind = rows, _depth(context)
            self._noted.setdefault(kind, collections.deque(maxlen=self.SAMPLES)).append(seconds)

    def note_draft(self, drafter: str, tokens: int, seconds: float) -> None:
        """A drafter has taken so long for so many tokens."""
        noted = self._drafts.setdefault(drafter, collections.deque(maxlen=self.SAMPLES))
        noted.append(seconds / tokens)

    def update(self) -> None:
        """Takes what was noted into account. Comes between requests."""
        for drafter, seconds in self._drafts.items():
            if len(seconds) >= self.FEW:
                self._drafting[drafter] = _median(seconds)
        for kind, seconds in self._noted.items():
            if len(seconds) >= self.FEW:
                self._table[kind] = _median(seconds)


def _median(seconds: Iterable[float]) -> float:
    values = sorted(seconds)
    return values[len(values) // 2]


def _depth(context: int) -> int:
    """Contexts of about the same length, from 2048 tokens on by powers of two."""
    return (context >> 11).bit_length()
