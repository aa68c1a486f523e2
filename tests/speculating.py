"""Rows that decode plainly and with drafts, and drafters that know the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from conftest import until

from _mlx_server.inference.decoding.row_group import row_group_class
from _mlx_server.inference.speculation.pass_costs import PassCosts
from _mlx_server.inference.speculation.rollback import Rollback
from _mlx_server.inference.speculation.speculation import Speculation
from engine import Engine

END = 2


class FixedCosts(PassCosts):
    """Costs that no real pass corrects."""

    def note(self, rows: int, context: int, seconds: float) -> None:
        pass

    def note_draft(self, drafter: str, tokens: int, seconds: float) -> None:
        pass


FREE = FixedCosts({1: 1.0, 32: 1.0})  # every draft is worth it


class Oracle:
    """Drafts what the answer will be, up to a point, and then something wrong: 1 to 31 tokens. It
    stands in for every drafter there can be."""

    name = "oracle"

    def __init__(self, answer: Sequence[int], prompt: int, seed: int = 0):
        self._answer, self._prompt, self._random = list(answer), prompt, random.Random(seed)
        self._at = 0
        self.drafted = self.accepted = 0

    def follow(self, tokens: Sequence[int], pending: int | None = None) -> None:
        self._at = len(tokens) + (pending is not None) - self._prompt

    def chances(self) -> list[float]:
        return [1.0] * self._random.randint(1, 31)

    def draft(self, row: Any, length: int) -> list[int]:
        pick = self._random
        right = self._answer[self._at :][: pick.choice([0, length, pick.randint(0, length)])]
        wrong = [pick.randrange(3, 500) for _ in range(length - len(right))]
        return right + wrong


def tokens(count: int, seed: int = 0) -> list[int]:
    pick = random.Random(seed)
    return [pick.randrange(3, 500) for _ in range(count)]


def row(
    model: Any,
    cache: list[Any],
    prompt: list[int],
    limit: int,
    sampler: Any = None,
    processors: Sequence[Any] = (),
) -> Any:
    """One request that has read its prompt and decodes on its own caches."""
    import mlx.core as mx
    from mlx_lm.generate import StopSequences
    from mlx_lm.sample_utils import greedy_sampler

    if len(prompt) > 1:
        model(mx.array([prompt[:-1]]), cache=cache)
    return row_group_class()(
        model,
        [1],
        mx.array(prompt[-1:]),
        cache,
        [prompt[:-1]],
        [sampler or greedy_sampler],
        sampler or greedy_sampler,
        [list(processors)],
        [StopSequences([[END]])],
        [limit],
    )


def decode(row: Any, heard: Any = None) -> tuple[list[int], list[Any]]:
    """A row's answer and its log-probabilities, without speculation. `heard` is told the tokens."""
    answer: list[int] = []
    logprobs = []
    while len(row):
        for response in row.next():
            if heard:
                heard(response.token, len(answer))
            answer.append(response.token)
            logprobs.append(response.logprobs)
    return answer, logprobs


def speculate(
    model: Any, rollback: Rollback, row: Any, drafter: Any, heard: Any = None
) -> tuple[list[int], list[Any], int]:
    """The same with a drafter, and how many passes it took."""
    speculation = Speculation(model, rollback, FREE, [END])
    answer: list[int] = []
    logprobs, passes = [], 0
    while len(row):
        passes += 1
        for response in speculation.step(row, [drafter]):
            speculation.take()
            if heard:
                heard(response.token, len(answer))
            answer.append(response.token)
            logprobs.append(response.logprobs)
        speculation.settle()
    return answer, logprobs, passes


def until_measured(engine: Engine) -> None:
    """Waits until it is known what the passes of the models in memory cost."""
    until(lambda: engine.stats().loaded > 0 and not engine.stats().unmeasured)


def difference(one: list[Any], other: list[Any]) -> float:
    """How far log-probabilities are apart."""
    import mlx.core as mx

    pairs = zip(one, other, strict=True)
    finite = [mx.where(a == b, 0, mx.abs(a - b)).max().item() for a, b in pairs]
    return float(max(finite))
