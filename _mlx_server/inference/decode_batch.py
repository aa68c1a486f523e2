"""All requests of a model that decode now, as one batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from _mlx_server.inference.group import Group
from _mlx_server.inference.prefix_cache import CacheEntry


class DecodeBatch:
    """The requests that decode together, in mlx-lm's `GenerationBatch` (the second half of its
    BatchGenerator). On the MLX thread.

    A request alone decodes on its own caches in place, so that its state is moved in and out and
    never copied, and every cache class works. When another one joins, both are merged into batch
    caches. `batch` is mlx-lm's object, None before the first request."""

    def __init__(self, model: Any, end_tokens: Iterable[int], group: Group):
        from mlx_lm.generate import StopSequences

        self.model = model
        self.batch: Any = None
        self._ends, self._group = StopSequences([[token] for token in end_tokens]), group
        self._count = 0

    def __len__(self) -> int:
        return len(self.batch.uids) if self.batch is not None else 0

    def __contains__(self, number: int) -> bool:
        return bool(len(self)) and number in self.batch.uids

    def accepts(self, cache: list[Any]) -> bool:
        """Whether a request with this cache can decode beside those that already do."""
        return not len(self) or all(hasattr(layer, "merge") for layer in cache)

    def insert(
        self, entry: CacheEntry, token: int, limit: int, sampler: Any, processors: list[Any]
    ) -> int:
        """Starts a request that has read `entry` and reads `token` next, for at most `limit`
        tokens; returns its number. The entry's caches are the batch's from here on. `processors`
        are mlx-lm's logits processors."""
        import mlx.core as mx
        from mlx_lm.generate import GenerationBatch

        self._count += 1
        batch: Any = GenerationBatch(
            self.model,
            [self._count],
            mx.array([token]),
            entry.cache,
            [list(entry.tokens)],
            [sampler],
            sampler,
            [list(processors)],
            [self._ends],
            [limit],
        )
        # No other request's rows are in there: there is nothing to extract them from.
        batch.extract_cache = lambda _: list(batch.prompt_cache)
        batch._next_tokens = self._group.sync_tokens(batch._next_tokens)
        if len(self):
            _make_mergeable(self.batch)
            _make_mergeable(batch)
            self.batch.extend(batch)
        else:
            self.batch = batch
        return self._count

    def step(self) -> list[Any]:
        """One token for each request: mlx-lm's responses, the last one of a request with its caches
        and all its tokens."""
        responses: list[Any] = self.batch.next() if len(self) else []
        if len(self):
            self.batch._next_tokens = self._group.sync_tokens(self.batch._next_tokens)
        return responses

    def peek(self, number: int) -> tuple[list[int], list[Any]]:
        """The tokens a request has read, and its caches; it uses these on if it decodes alone."""
        at = self.batch.uids.index(number)
        return list(self.batch.tokens[at]), self.batch.extract_cache(at)

    def tokens_read(self) -> dict[int, list[int]]:
        """The tokens that each request has read, by number."""
        return dict(zip(self.batch.uids, self.batch.tokens, strict=False)) if len(self) else {}

    def upcoming(self, number: int) -> Any:
        """A response for the token that a request has picked but not read yet; the next step would
        return the same."""
        batch = self.batch
        at = batch.uids.index(number)
        token, logprobs = int(batch._next_tokens[at].item()), batch._next_logprobs[at]
        return batch.Response(number, token, logprobs, None, None, None)

    def remove(self, number: int) -> tuple[list[int], list[Any]]:
        """Takes a request out before its end: the tokens it has read and its caches."""
        state = self.peek(number)
        self.discard(number)
        return state

    def discard(self, number: int) -> None:
        """Takes a request out, if it is still there, with all that it has computed."""
        if number in self:
            self.batch.filter([at for at, uid in enumerate(self.batch.uids) if uid != number])


def _make_mergeable(batch: Any) -> None:
    """Gives a batch of one request, which decodes on its own caches, caches for several."""
    if "extract_cache" in vars(batch):
        del batch.extract_cache
        batch.prompt_cache = [layer.merge([layer]) for layer in batch.prompt_cache]
