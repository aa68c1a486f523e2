"""KV states of earlier requests, found again by their tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from _mlx_server.inference.group import Group
from _mlx_server.inference.layers import copy_layer, is_trimmable, own_buffers


class Checkpoint:
    """The states of a model's layers at some length: of those that cannot be cut back, None for the
    others."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.nbytes = sum(layer.nbytes for layer in layers if layer is not None)


@dataclass(eq=False, repr=False)
class CacheEntry:
    """The KV state of one conversation: `tokens` are exactly what `cache` (one mlx-lm cache a
    layer) has read.

    A layer with plain or quantised KV can be cut back to any length. Sliding-window and recurrent
    layers cannot, so `checkpoints` keeps their states at chosen lengths; lines that have branched
    share them. `model` is the fingerprint of what has read them, `root` the length of system and
    tools, `turns` are the lengths at which the user's latest turns ended: a template that drops old
    thinking goes back there. `answers` tells at which length each remembered answer ends."""

    CHECKPOINTS = 10  # besides those at the root and the latest turns

    tokens: list[int]
    cache: list[Any]
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    root: int = 0
    turns: list[int] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    used: float = 0.0
    written: bool = False  # nothing of it is left to write to disk
    model: str = ""

    @property
    def nbytes(self) -> int:
        return self.cache_nbytes + sum(
            checkpoint.nbytes for checkpoint in self.checkpoints.values()
        )

    @property
    def cache_nbytes(self) -> int:
        """Without the snapshots."""
        return sum(layer.nbytes for layer in self.cache)

    @property
    def trimmable(self) -> bool:
        return all(map(is_trimmable, self.cache))

    def restorable(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that this line can give."""
        if length >= len(self.tokens) or self.trimmable:
            return min(length, len(self.tokens))
        return max((at for at in tuple(self.checkpoints) if at <= length), default=0)

    def checkpoint(self) -> None:
        """Remembers the layers that cannot be cut back later, as they are now. On the MLX thread.

        Of too many the one goes that leaves the smallest gap for its distance from the end: near
        the end, where edits are likely, they stay dense, and far back one still restarts not too
        far from an edit."""
        if self.trimmable:
            return
        end = len(self.tokens)
        self.checkpoints[end] = Checkpoint(
            [None if is_trimmable(c) else copy_layer(c) for c in self.cache]
        )
        at = sorted(self.checkpoints)
        gaps = {
            here: (after - before) / (end - here + 1)
            for before, here, after in zip([0, *at], at, at[1:])
            if here != self.root and here not in self.turns[-2:]
        }
        if len(gaps) > self.CHECKPOINTS:
            del self.checkpoints[min(gaps, key=gaps.get)]

    def layers(self, start: int, end: int) -> list[Any]:
        """What tokens `start` to `end` (a restorable length) contribute: copies of that part of the
        layers that can be cut, and of the others' whole state at `end`. On the MLX thread."""
        kept = (
            self.checkpoints[end].layers
            if end < len(self.tokens) and not self.trimmable
            else [None] * len(self.cache)
        )
        return [
            copy_layer(layer if state is None else state, start, end)
            for layer, state in zip(self.cache, kept)
        ]

    def branch(self, length: int) -> CacheEntry:
        """A copy of the first `length` tokens, which must be restorable. On the MLX thread."""
        return CacheEntry(
            self.tokens[:length],
            self.layers(0, length),
            {at: s for at, s in self.checkpoints.items() if at <= length},
            self.root,
            [at for at in self.turns if at <= length],
            {key: at for key, at in self.answers.items() if at <= length},
            model=self.model,
        )


class PrefixCache:
    """KV states of earlier requests to all models, found by longest common token prefix.

    Policy. A request takes the line that gives it the most tokens. When the conversation simply
    goes on, the line moves into the request and comes back longer; when it branches, the shared
    part is copied and the line stays. Memory is bounded in real bytes: the least recently used line
    goes first, where one that was never used again (a title, a sub-agent's only turn) counts as
    `ONE_OFF` seconds older, and the last thing kept of a line is its root (system and tools), which
    every new conversation of that client shares. A line larger than all the room there is keeps its
    beginning. A line is named by the model's fingerprint and its tokens, and no state of one model
    is ever given to another."""

    ONE_OFF = 600.0

    def __init__(self, room: Callable[[], int], group: Group = Group()):
        """`room` tells how many bytes there are for it at the moment."""
        self._room, self._group = room, group
        # With the bytes of their caches, which do not change in here
        self._lines: dict[CacheEntry, int] = {}

    @property
    def nbytes(self) -> int:
        return self._bytes(list(self._lines))

    def _bytes(self, lines: list[CacheEntry]) -> int:
        """What lines take together; what several of them share counts once."""
        shared = {checkpoint for line in lines for checkpoint in line.checkpoints.values()}
        return sum(self._lines.get(line, 0) for line in lines) + sum(
            checkpoint.nbytes for checkpoint in shared
        )

    @property
    def limit(self) -> int:
        """Most bytes at the moment."""
        return max(0, self._room())

    def lines(self, model: str) -> list[CacheEntry]:
        """What there is of a model. From any thread."""
        return [line for line in list(self._lines) if line.model == model]

    def find(self, model: str, tokens: list[int]) -> tuple[CacheEntry | None, int]:
        """The line that restores the longest proper prefix of `tokens`, and that length. From any
        thread: it only reads."""
        best, length = None, 0
        for line in self.lines(model):
            usable = line.restorable(min(common_prefix(line.tokens, tokens), len(tokens) - 1))
            if usable > length:
                best, length = line, usable
        return best, length

    def closest(self, model: str, tokens: list[int]) -> tuple[list[int], int]:
        """The tokens of the line that agrees with `tokens` the longest, and how many those are.
        From any thread."""
        pairs = ((line.tokens, common_prefix(line.tokens, tokens)) for line in self.lines(model))
        return max(pairs, key=lambda pair: pair[1], default=([], 0))

    def take(self, model: str, tokens: list[int]) -> CacheEntry | None:
        """The state to start from: a line moved out of the cache or a copy of one's beginning. On
        the MLX thread."""
        line, length = self.find(model, tokens)
        if line is None:
            return None
        line.hits += 1
        line.used = time.monotonic()
        if length == len(line.tokens):
            del self._lines[line]
            return line
        return line.branch(length)

    def held(self, model: str) -> int:
        """Bytes of a model's states. From any thread."""
        return self._bytes(self.lines(model))

    def put(self, line: CacheEntry) -> None:
        """Files a state and makes room for it. A line that the new one continues is dropped. On the
        MLX thread."""
        import mlx.core as mx

        mx.eval([own_buffers(layer).state for layer in line.cache if not is_trimmable(layer)])
        if self._group.broadcast(lambda: line.nbytes > self.limit):
            line = self._beginning(line)
        if not line.tokens:
            return
        line.used = time.monotonic()
        for old in self.lines(line.model):
            shared = common_prefix(old.tokens, line.tokens)
            if shared == len(old.tokens) and line.restorable(shared) == shared:
                del self._lines[old]
                line.hits = max(line.hits, old.hits)
            elif shared == len(line.tokens) and old.restorable(shared) == shared:
                return
        self._lines[line] = line.cache_nbytes
        self.evict()

    def drop(self, model: str) -> None:
        """Forgets all of a model. On the MLX thread."""
        for line in self.lines(model):
            del self._lines[line]

    def unwritten(self, model: str) -> CacheEntry | None:
        """The model's most recently used line that is not on disk yet."""
        return max(
            (line for line in self.lines(model) if not line.written),
            key=lambda line: line.used,
            default=None,
        )

    def _beginning(self, line: CacheEntry) -> CacheEntry:
        """The longest beginning of a line that fits."""
        length = self._group.broadcast(
            lambda: int(len(line.tokens) * self.limit / line.nbytes * 0.95)
        )
        while length := line.restorable(length):
            shorter = line.branch(length)
            if self._group.broadcast(lambda: shorter.nbytes <= self.limit):
                return shorter
            length -= 1 + length // 8
        return CacheEntry([], [])

    def evict(self, spare: int = 0) -> None:
        """Keeps within its room, and so many bytes below. On the MLX thread."""
        while (
            self._lines and (at := self._group.broadcast(lambda: self._surplus(spare))) is not None
        ):
            victim = list(self._lines)[at]
            del self._lines[victim]
            if (
                0 < victim.root < len(victim.tokens)
                and victim.restorable(victim.root) == victim.root
            ):
                others = self.lines(victim.model)
                if not any(
                    common_prefix(victim.tokens, line.tokens) >= victim.root for line in others
                ):
                    kept = victim.branch(victim.root)
                    kept.hits, kept.used, kept.written = 1, victim.used, victim.written
                    self._lines[kept] = kept.cache_nbytes

    def _surplus(self, spare: int) -> int | None:
        """Which line has to go, if one has to."""
        if self.nbytes <= self.limit - spare:
            return None
        ages = [line.used - (0 if line.hits else self.ONE_OFF) for line in self._lines]
        return ages.index(min(ages))


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share; by halving, since comparing slices runs in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
