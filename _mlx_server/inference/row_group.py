"""Requests of about the same length that decode in one forward pass."""

from __future__ import annotations

import functools
from typing import Any

from _mlx_server.inference.group import Group


@functools.cache
def row_group_class() -> Any:
    """mlx-lm's `GenerationBatch`, whose only row uses its own caches in place: it is not copied,
    and every cache class works. Several rows share batch caches, in which each row is padded to the
    longest. Made at the first call, since mlx-lm takes long to import."""
    from mlx_lm.generate import GenerationBatch

    class RowGroup(GenerationBatch):
        in_place = True  # its only row uses the caches that it came with
        closed = False  # no other row joins

        def extract_cache(self, idx: int) -> list[Any]:
            return list(self.prompt_cache) if self.in_place else super().extract_cache(idx)

        def extend(self, batch: RowGroup) -> None:
            """Takes in the rows of another group. It must not be used any more."""
            if self.in_place and batch.in_place:
                pairs = list(zip(self.prompt_cache, batch.prompt_cache, strict=True))
                cache = [one.merge([one, other]) for one, other in pairs]
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
                return [layer.merge([layer]) for layer in self.prompt_cache]
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
