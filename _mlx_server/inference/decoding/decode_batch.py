"""All requests of a model that decode now, as rows of one or more groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.cache.layers import can_merge, merge_caches
from _mlx_server.inference.cache.prefix_cache import CacheEntry
from _mlx_server.inference.decoding.row_group import FirstPass, row_group_class
from _mlx_server.inference.group import Group
from _mlx_server.inference.images.vision import ImageRows
from _mlx_server.inference.memory import StateSize
from _mlx_server.inference.speculation.speculation import Drafter, Speculation


@dataclass
class Row:
    """A request with the prompt `tokens`, which has read `entry` of it, for at most `limit` tokens.
    `processors` are mlx-lm's logits processors, `shift` is what images have added to the positions
    of the tokens that are still to be read."""

    entry: CacheEntry
    tokens: list[int]
    limit: int
    sampler: Any
    processors: list[Any]
    shift: int = 0


class DecodeBatch:
    """The requests that decode now. On the MLX thread.

    Policy. A group is read by one forward pass, and its rows are padded to the longest of them.
    Each further group reads the weights once more, so requests of about the same length share one:
    the padding takes at most `SLACK` of what the rows themselves take, or `SPARE` of the weights
    (`LEAST` bytes where they are few). A long conversation beside short ones is a group of its own,
    whose caches are neither copied nor padded when others come and go. The groups take turns, a
    step each. One that a request has joined is the next, but not twice in a row."""

    SLACK = 0.25
    SPARE = 0.125
    LEAST = 8 << 20

    def __init__(
        self,
        model: Any,
        end_tokens: Iterable[int],
        size: int,
        state_size: StateSize,
        group: Group,
        images: ImageRows | None = None,
        speculation: Speculation | None = None,
    ):
        """`size` is the bytes of the weights; `images` is for a model that sees. Without
        `speculation` a step brings each request one token."""
        from mlx_lm.generate import StopSequences

        self.model, self.speculation = model, speculation
        self._ends, self._group = StopSequences([[token] for token in end_tokens]), group
        self._size, self._state_size, self._images = size, state_size, images
        self._count = 0
        self._groups: list[Any] = []  # the next one first
        self._last: Any = None  # the group that has had the latest turn
        self._begun: Any = None  # the group of which something may still be computed
        self._stepped: list[int] = []  # its rows, also those that have ended since

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __contains__(self, number: int) -> bool:
        return any(number in group.uids for group in self._groups)

    @property
    def groups(self) -> int:
        """How many forward passes it takes to give each request a token."""
        return len(self._groups)

    @property
    def padding(self) -> int:
        """Bytes of padding in all groups. It does not grow as long as no request joins."""
        return sum(self._padding(group.lengths()) for group in self._groups)

    def insert(self, rows: list[Row], room: int | None) -> list[int]:
        """Starts requests, which have to be alike, with one pass that reads what is left of their
        prompts; returns their numbers. Their entries' caches are the batch's from here on. There
        may be `room` more bytes of padding; with None a request gets a group of its own, which no
        other joins."""
        import mlx.core as mx

        self.settle()
        numbers = list(range(self._count + 1, self._count + 1 + len(rows)))
        self._count += len(rows)
        cache = rows[0].entry.cache
        if len(rows) > 1:
            cache = merge_caches([row.entry.cache for row in rows])
        tokens = [row.tokens[:-1] for row in rows]
        parts = [row.tokens[len(row.entry.tokens) :] for row in rows]
        several = any(len(part) > 1 for part in parts)
        if self._images:
            shifts = {number: row.shift for number, row in zip(numbers, rows, strict=True)}
            others = [number for group in self._groups for number in group.uids]
            tokens = self._images.add(shifts, tokens, others)
        with self._positions(numbers):
            new: Any = row_group_class()(
                FirstPass(self.model, parts) if several else self.model,
                numbers.copy(),
                mx.array([row.tokens[-1] for row in rows]),
                cache,
                tokens,
                [row.sampler for row in rows],
                rows[0].sampler,
                [row.processors for row in rows],
                [self._ends] * len(rows),
                [row.limit for row in rows],
            )
        new.model, new.in_place = self.model, len(rows) == 1
        new.sync_tokens(self._group)
        if several:  # a failure is theirs, and so is the time
            mx.synchronize()
            mx.clear_cache()
        new.closed = room is None or not can_merge(rows[0].entry.cache)
        joined = None if room is None or new.closed else self._like(new, room)
        if joined is None:
            joined = new
        else:
            joined.extend(new)
            self._groups.remove(joined)
        self._groups.insert(0 if joined is not self._last else len(self._groups), joined)
        self._begun, self._stepped = joined, list(joined.uids)
        return numbers

    def alike(self, lengths: list[int], room: int) -> bool:
        """Whether rows of these lengths can share a group whose padding has so many bytes."""
        padding = self._padding(lengths)
        return padding <= min(max(0, room), self._most(self._state_size.token * sum(lengths)))

    def _positions(self, numbers: list[int]) -> contextlib.AbstractContextManager[None]:
        """Sets the positions for a step of these rows."""
        return self._images.during(numbers) if self._images else contextlib.nullcontext()

    def _like(self, new: Any, room: int) -> Any:
        """The group that a new one joins with the least padding; None if it stays alone."""
        best, least = None, 0
        for group in self._groups:
            lengths = group.lengths()
            together = [*lengths, *new.lengths()]
            already = self._padding(lengths)
            added = self._padding(together) - already
            if group.closed or not self.alike(together, room + already):
                continue
            if best is None or added < least:
                best, least = group, added
        return best

    def _most(self, own: float) -> float:
        """Bytes of padding that a group may have, of which the rows themselves take `own`."""
        return max(self.SLACK * own, self.SPARE * self._size, self.LEAST)

    def _padding(self, lengths: list[int]) -> int:
        padded = len(lengths) * max(lengths) - sum(lengths)
        return int(self._state_size.token * padded)

    def step(self, drafters: Sequence[Drafter] = ()) -> list[Any]:
        """One token for each request of the group whose turn it is: mlx-lm's responses, the last
        one of a request with its caches and all its tokens. With `drafters`, those of the only
        request, it may be several tokens: each is to be taken, as long as the request goes on."""
        self.settle()
        if not self._groups:
            return []
        group = self._groups.pop(0)
        self._groups.append(group)
        self._last = self._begun = group
        self._stepped = list(group.uids)
        with self._positions(self._stepped):
            responses = self._read(group, drafters)
        group.sync_tokens(self._group)
        if not len(group):
            self._groups.remove(group)
        return responses

    def _read(self, group: Any, drafters: Sequence[Drafter]) -> list[Any]:
        """The responses of a step of a group."""
        if self.speculation is not None:
            if drafters and len(self) == 1 and group.in_place:
                return self.speculation.step(group, drafters)
            self.speculation.drop()
        responses: list[Any] = group.next()
        return responses

    def take(self) -> None:
        """The next token of the last step was taken."""
        if self.speculation is not None:
            self.speculation.take()

    def settle(self) -> None:
        """Forgets the tokens of the last step that were not taken, before anyone sees them."""
        if self.speculation is not None:
            self.speculation.settle()

    def peek(self, number: int) -> tuple[list[int], list[Any]]:
        """The tokens a request has read, those of images as the model knows them, and its caches;
        it uses these on if it is alone in its group."""
        group, at = self.find(number)
        return list(group.tokens[at]), group.extract_cache(at)

    def upcoming(self, number: int) -> Any:
        """A response for the token that a request has picked but not read yet; the next step would
        return the same."""
        group, at = self.find(number)
        return group.upcoming(at)

    def find(self, number: int) -> tuple[Any, int]:
        """The group of a request, a `RowGroup`, and the request's row in it."""
        self.settle()
        group = next(group for group in self._groups if number in group.uids)
        return group, group.uids.index(number)

    def remove(self, number: int) -> tuple[list[int], list[Any]]:
        """Takes a request out before its end: the tokens it has read and its caches."""
        state = self.peek(number)
        self.discard(number)
        return state

    def discard(self, number: int) -> None:
        """Takes a request out, if it is still there, with all that it has computed."""
        if self.speculation is not None:
            self.speculation.drop()
        for group in self._groups:
            if number in group.uids:
                group.filter([at for at, uid in enumerate(group.uids) if uid != number])
        self._groups = [group for group in self._groups if len(group)]

    @property
    def drafting(self) -> bool:
        """Whether the last step has read a draft, or has failed to."""
        return self.speculation is not None and self.speculation.drafting

    def drop_failed(self) -> dict[int, list[int] | None]:
        """Drops the group that has failed, which is the last one that has begun to compute
        something: the tokens that each of its requests has read, by number, or None for one that
        has ended."""
        if self.speculation is not None:
            self.speculation.drop()
        failed = self._begun
        self._groups = [group for group in self._groups if group is not failed]
        read = dict(zip(failed.uids, failed.tokens, strict=False)) if failed else {}
        self._begun = None
        return {number: read.get(number) for number in self._stepped}
