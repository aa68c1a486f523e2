"""Requests of about the same length that decode in one forward pass."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.cache.layers import merge_caches
from _mlx_server.inference.group import Group

if TYPE_CHECKING:
    import mlx.core as mx


class OnlyRow:
    """What is done with the only row of a group: it may read several tokens at once."""

    tokens: list[list[int]]
    max_tokens: list[int]
    logits_processors: Any
    _num_tokens: list[int]
    _token_context: list[Any]
    _next_tokens: mx.array
    _next_logprobs: list[mx.array]

    def left(self) -> int:
        """How many tokens it may still get."""
        return self.max_tokens[0] - self._num_tokens[0]

    def context(self) -> mx.array:
        """The tokens that it has read, for logits processors."""
        context: mx.array = self._token_context[0].tokens
        return context

    def advance(self, tokens: list[int], pending: int, logprobs: mx.array) -> None:
        """Takes note that it has read more tokens, and has picked `pending` behind them, which has
        these log-probabilities (vocabulary)."""
        import mlx.core as mx

        self.tokens[0].extend(tokens)
        if self.logits_processors[0]:
            self._token_context[0].update_and_fetch(mx.array(tokens))
        self._num_tokens[0] += len(tokens)
        self._next_tokens, self._next_logprobs = mx.array([pending], mx.uint32), [logprobs]


def read_rows(model: Any, parts: list[list[int]], cache: list[Any]) -> mx.array:
    """Lets a model read more tokens of each row in one pass, as mlx-lm's `PromptProcessingBatch`
    does: these are padded on the right, and what the shared `cache` holds on the left. Returns the
    logits (rows, longest part, vocabulary), not computed yet."""
    import mlx.core as mx

    lengths = [len(part) for part in parts]
    padding = [max(lengths) - length for length in lengths]
    tokens = [part + [0] * more for part, more in zip(parts, padding, strict=True)]
    if any(padding):
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
    logits: mx.array = model(mx.array(tokens), cache=cache)
    if any(padding):
        for layer in cache:
            layer.finalize()
    return logits


class FirstPass:
    """The model for the first pass of a group, which reads several tokens of each row: the last
    ones of its prompt."""

    def __init__(self, model: Any, parts: list[list[int]]):
        self._model, self._parts = model, parts

    def __call__(self, _: mx.array, cache: list[Any]) -> mx.array:
        """The logits behind each row's last token, (rows, 1, vocabulary)."""
        import mlx.core as mx

        logits = read_rows(self._model, self._parts, cache)
        last = mx.array([len(part) - 1 for part in self._parts])
        return logits[mx.arange(len(self._parts)), last][:, None]


@functools.cache
def row_group_class() -> Any:
    """mlx-lm's `GenerationBatch`, whose only row uses its own caches in place: it is not copied,
    and every cache class works. Several rows share batch caches, in which each row is padded to the
    longest. Made at the first call, since mlx-lm takes long to import."""
    from mlx_lm.generate import GenerationBatch

    class RowGroup(OnlyRow, GenerationBatch):
        in_place = True  # its only row uses the caches that it came with
        closed = False  # no other row joins

        def extract_cache(self, idx: int) -> list[Any]:
            return list(self.prompt_cache) if self.in_place else super().extract_cache(idx)

        def extend(self, batch: RowGroup) -> None:
            """Takes in the rows of another group. It must not be used any more."""
            if self.in_place and batch.in_place:
                cache = merge_caches([self.prompt_cache, batch.prompt_cache])
            else:
                cache = self.batch_cache()
                for one, other in zip(cache, batch.batch_cache(), strict=True):
                    one.extend(other)
            self.prompt_cache, batch.prompt_cache = [], []
            super().extend(batch)  # type: ignore[no-untyped-call]
            self.prompt_cache, self.in_place = cache, False

        def batch_cache(self) -> list[Any]:
            """Its caches in the form that several rows share."""
            if self.in_place:
                return merge_caches([self.prompt_cache])
            return self.prompt_cache

        def filter(self, keep: list[int]) -> None:
            """Keeps these rows. What a single row needs is copied in any case, and is its own from
            then on."""
            if len(keep) != 1 or self.in_place:
                super().filter(keep)
                return
            cache, self.prompt_cache = self.extract_cache(keep[0]), []
            super().filter(keep)
            self.prompt_cache, self.in_place = cache, True

        def sync_tokens(self, group: Group) -> None:
            """Takes over the tokens that rank 0 has picked."""
            if len(self):
                self._next_tokens = group.sync_tokens(self._next_tokens)

        def lengths(self) -> list[int]:
            """How many tokens each row has read."""
            return [len(row) for row in self.tokens]

        def upcoming(self, at: int) -> Any:
            """A response for the token that a row has picked but not read yet."""
            token: Any = self._next_tokens[at].item()
            return self.Response(self.uids[at], token, self._next_logprobs[at], None, None, None)

    return RowGroup
