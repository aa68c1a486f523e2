"""All requests of a model that decode now, as one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from _mlx_server.inference.group import Group
from _mlx_server.inference.prefix_cache import CacheEntry
from _mlx_server.inference.vision import ImageRows


class DecodeBatch:
    """The requests that decode together, in mlx-lm's `GenerationBatch` (the second half of its
    BatchGenerator). On the MLX thread.

    A request alone decodes on its own caches in place, so that its state is moved in and out and
    never copied, and every cache class works. When another one joins, both are merged into batch
    caches. `batch` is mlx-lm's object, None before the first request. `images` is for a model
    that sees."""

    def __init__(
        self, model: Any, end_tokens: Iterable[int], group: Group, images: ImageRows | None = None
    ):
        from mlx_lm.generate import StopSequences

        self.model = model
        self.batch: Any = None
        self._ends, self._group = StopSequences([[token] for token in end_tokens]), group
        self._count = 0
        self._images = images

    def __len__(self) -> int:
        return len(self.batch.uids) if self.batch is not None else 0

    def __contains__(self, number: int) -> bool:
        return bool(len(self)) and number in self.batch.uids

    def accepts(self, cache: list[Any]) -> bool:
        """Whether a request with this cache can decode beside those that already do."""
        return not len(self) or all(hasattr(layer, "merge") for layer in cache)

    def insert(
        self,
        entry: CacheEntry,
        token: int,
        limit: int,
        sampler: Any,
        processors: list[Any],
        shift: int = 0,
    ) -> int:
        """Starts a request that has read `entry` and reads `token` next, for at most `limit`
        tokens; returns its number. The entry's caches are the batch's from here on. `processors`
        are mlx-lm's logits processors. `shift` is what images have added to the positions."""
        import mlx.core as mx
        from mlx_lm.generate import GenerationBatch

        self._count += 1
        tokens = list(entry.tokens)
        if self._images:
            tokens = self._images.add(self._count, tokens, shift)
        with self._step_of([self._count]):
            batch: Any = GenerationBatch(
                self.model,
                [self._count],
                mx.array([token]),
                entry.cache,
                [tokens],
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
        if not len(self):
            return []
        with self._step_of(self.batch.uids):
            responses: list[Any] = self.batch.next()
        for response in responses:
            if self._images and response.finish_reason:
                self._images.remove(response.uid)
        if len(self):
            self.batch._next_tokens = self._group.sync_tokens(self.batch._next_tokens)
        return responses

    def _step_of(self, numbers: list[int]) -> contextlib.AbstractContextManager[None]:
        return self._images.step(numbers) if self._images else contextlib.nullcontext()

    def peek(self, number: int) -> tuple[list[int], list[Any]]:
        """The tokens a request has read, those of images as the model knows them, and its caches;
        it uses these on if it decodes alone."""
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
        if self._images:
            self._images.remove(number)
        if number in self:
            self.batch.filter([at for at, uid in enumerate(self.batch.uids) if uid != number])


def _make_mergeable(batch: Any) -> None:
    """Gives a batch of one request, which decodes on its own caches, caches for several."""
    if "extract_cache" in vars(batch):
        del batch.extract_cache
        batch.prompt_cache = [layer.merge([layer]) for layer in batch.prompt_cache]
