"""All requests of a model that decode now, as one batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from _mlx_server.inference.group import Group
from _mlx_server.inference.prefix_cache import CacheEntry


class DecodeBatch:
    """All requests of a model that decode now, as one batch of mlx-lm's (`GenerationBatch`, the
    second half of BatchGenerator).

    A request alone decodes on its own caches in place, so that its state is moved in and out and
    never copied, and every cache class works. When another one joins, both are merged into batch
    caches. On the MLX thread."""

    def __init__(self, model: Any, end_tokens: Iterable[int], group: Group):
        from mlx_lm.generate import StopSequences

        self._model, self.can_end, self._group = (
            model,
            StopSequences([[token] for token in end_tokens]),
            group,
        )
        self._batch: Any = None
        self._count = 0

    def __len__(self) -> int:
        return len(self._batch.uids) if self._batch is not None else 0

    def accepts(self, cache: list[Any]) -> bool:
        """Whether a request with this cache can decode beside those that already do."""
        return not len(self) or all(hasattr(layer, "merge") for layer in cache)

    def insert(
        self, line: CacheEntry, token: int, limit: int, sampler: Any, processors: list[Any]
    ) -> int:
        """Starts a request that has read `line` and reads `token` next; returns its number. The
        line's caches are the decoder's from here on. `processors` are mlx-lm's logits
        processors."""
        import mlx.core as mx
        from mlx_lm.generate import GenerationBatch

        self._count += 1
        batch = GenerationBatch(
            self._model,
            [self._count],
            mx.array([token]),
            line.cache,
            [list(line.tokens)],
            [sampler],
            sampler,
            [tuple(processors)],
            [self.can_end],
            [limit],
        )
        batch.extract_cache = lambda _: list(batch.prompt_cache)  # nobody else's rows are in there
        batch._next_tokens = self._group.sync_tokens(batch._next_tokens)
        if len(self):
            _share(self._batch)
            _share(batch)
            self._batch.extend(batch)
        else:
            self._batch = batch
        return self._count

    def step(self) -> list[Any]:
        """One token for everyone: mlx-lm's responses, the last one of a request with its caches and
        all its tokens."""
        responses = self._batch.next() if len(self) else []
        if len(self):
            self._batch._next_tokens = self._group.sync_tokens(self._batch._next_tokens)
        return responses

    def peek(self, number: int) -> tuple[list[int], list[Any]]:
        """The tokens a request has read and its caches, which are still in use if it decodes
        alone."""
        at = self._batch.uids.index(number)
        return list(self._batch.tokens[at]), self._batch.extract_cache(at)

    def upcoming(self, number: int) -> Any:
        """A response for the token that a request has picked but not read yet; the next step would
        bring the same."""
        at, batch = self._batch.uids.index(number), self._batch
        return batch.Response(
            number, int(batch._next_tokens[at].item()), batch._next_logprobs[at], None, None, None
        )

    def remove(self, number: int) -> tuple[list[int], list[Any]]:
        """Takes a request out before its end: the tokens it has read and its caches."""
        state = self.peek(number)
        self.discard(number)
        return state

    def discard(self, number: int) -> None:
        """Takes a request out, if it is still there, with all that it has computed."""
        if number in self._batch.uids:
            self._batch.filter([at for at, uid in enumerate(self._batch.uids) if uid != number])


def _share(batch: Any) -> None:
    """Gives a batch caches that can hold several requests, if it has those of a single one."""
    if "extract_cache" in vars(batch):
        del batch.extract_cache
        batch.prompt_cache = [layer.merge([layer]) for layer in batch.prompt_cache]
