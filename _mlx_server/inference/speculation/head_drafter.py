"""Drafts an answer's next tokens with the model's own MTP head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

NAME = "mtp"


class HeadDrafter:
    """A drafter that asks the model's MTP head, whose state is in the request's caches. It drafts
    what the request's sampler picks from the head's log-probabilities, with the same draws as for
    the model's own: where both agree on the probabilities, they agree on the token.

    `drafted` and `accepted` count tokens."""

    name = NAME

    # How likely tokens are right at first. A request's own tokens correct that, as if it were known
    # from WEIGHT of them, and count ever less, by a factor for each further token: a head that was
    # no use is tried again.
    PRIOR = (0.85, 0.75, 0.65)
    WEIGHT = 4.0
    FACTOR = 1 - 1 / 128

    def __init__(self, model: Any):
        """`model` has a head: see `mtp.attach`."""
        self._model = model
        self._tried = [0.0] * len(self.PRIOR)
        self._right = [0.0] * len(self.PRIOR)
        self._length = 0  # tokens that it knows
        self._guessed: list[int] = []  # tokens of the last draft from the next one on,
        self._depth = 0  # which is its token at this index
        self.drafted = self.accepted = 0

    def follow(self, tokens: Sequence[int], pending: int | None = None) -> None:
        """Takes note of all tokens that were read so far, and of the one that was picked behind
        them, if it is known."""
        known = len(tokens) + (pending is not None)
        for at in range(self._length, known):
            if not self._guessed:
                break
            self._score(self._guessed[0] == (tokens[at] if at < len(tokens) else pending))
        factor = self.FACTOR ** max(0, known - self._length)
        self._tried = [factor * tried for tried in self._tried]
        self._right = [factor * right for right in self._right]
        self._length = max(self._length, known)

    def _score(self, right: bool) -> None:
        self._tried[self._depth] += 1
        self._right[self._depth] += right
        self._guessed, self._depth = self._guessed[1:] if right else [], self._depth + 1

    def chances(self) -> list[float]:
        """Of each token that it can draft now: how likely it is right if all before are."""
        sums = zip(self._right, self._tried, self.PRIOR, strict=True)
        return [
            (right + self.WEIGHT * prior) / (tried + self.WEIGHT) for right, tried, prior in sums
        ]

    def draft(self, row: Any, length: int) -> list[int]:
        """The tokens that may follow the row's pending one."""
        from _mlx_server.inference.speculation.mtp import guess

        sampler = row.samplers[0]

        def pick(logprobs: mx.array, at: int) -> mx.array:
            if hasattr(sampler, "pick"):
                picked: mx.array = sampler.pick(logprobs, sampler.place + at)
            else:
                picked = sampler(logprobs)
            return picked

        pending = row.upcoming(0).token
        self._guessed = guess(self._model, row.prompt_cache, pending, length, pick)
        self._depth = 0
        return list(self._guessed)


def prepare_head(model: Any, cache: list[Any]) -> Callable[[], object]:
    """What has the head of a model draft a token, so that its time can be measured. `cache` is a
    new one, which is used up."""
    import mlx.core as mx
    from mlx_lm.sample_utils import greedy_sampler

    from _mlx_server.inference.speculation.mtp import guess

    model(mx.array([[0]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return lambda: guess(model, cache, 0, 1, lambda logprobs, at: greedy_sampler(logprobs))
