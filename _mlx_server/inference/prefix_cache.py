"""KV states of earlier requests, found again by their tokens."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from _mlx_server.inference.group import Group
from _mlx_server.inference.layers import copy_layer, is_trimmable, own_buffers


class Checkpoint:
    """The states of a model's layers at some length: of those that cannot be trimmed, None for the
    others."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.nbytes = sum(int(layer.nbytes) for layer in layers if layer is not None)


@dataclass(eq=False, repr=False)
class CacheEntry:
    """The KV state of one conversation: `tokens` are exactly what `cache` (one mlx-lm cache a
    layer) has read.

    Where not every layer is trimmable, `checkpoints` keeps the states of the others at chosen
    lengths; entries that have branched share them. `model` is the fingerprint of the model that has
    read the tokens, `root` the length of system and tools, `turns` are the lengths at which the
    user's latest turns ended: a template that drops old thinking goes back there. `answers` tells
    at which length each remembered answer ends.

    Any thread may read an entry while it is in the prefix cache and while the MLX thread works with
    it: lists and dicts are replaced, never changed."""

    CHECKPOINTS = 10  # besides those at the root and the latest turns

    tokens: list[int]
    cache: list[Any]
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    root: int = 0
    turns: list[int] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    used: float = 0.0
    written: bool = False  # the disk cache has all of it, or cannot have it
    model: str = ""
    trimmable: bool = field(init=False)  # all of its layers are

    def __post_init__(self) -> None:
        self.trimmable = all(map(is_trimmable, self.cache))

    @property
    def nbytes(self) -> int:
        """Bytes with the checkpoints."""
        return self.cache_nbytes + sum(one.nbytes for one in self.checkpoints.values())

    @property
    def cache_nbytes(self) -> int:
        """Bytes without the checkpoints."""
        return sum(int(layer.nbytes) for layer in self.cache)

    def restorable(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that this entry can give."""
        if length >= len(self.tokens) or self.trimmable:
            return min(length, len(self.tokens))
        return max((at for at in self.checkpoints if at <= length), default=0)

    def add_checkpoint(self) -> None:
        """Keeps the layers that cannot be trimmed later, as they are now. On the MLX thread.

        Of too many the one goes that leaves the smallest gap for its distance from the end: near
        the end, where edits are likely, they stay dense, and far back one still restarts not too
        far from an edit."""
        if self.trimmable:
            return
        end = len(self.tokens)
        kept = [None if is_trimmable(layer) else copy_layer(layer) for layer in self.cache]
        checkpoints = {**self.checkpoints, end: Checkpoint(kept)}
        at = sorted(checkpoints)
        gaps = {
            here: (after - before) / (end - here + 1)
            for before, here, after in zip([0, *at], at, at[1:], strict=False)
            if here != self.root and here not in self.turns[-2:]
        }
        if len(gaps) > self.CHECKPOINTS:
            del checkpoints[min(gaps, key=lambda here: gaps[here])]
        self.checkpoints = checkpoints

    def add_answer(self, key: str) -> None:
        """Notes that the remembered answer `key` ends where the tokens end now."""
        self.answers = {**self.answers, key: len(self.tokens)}

    def layers(self, start: int, end: int) -> list[Any]:
        """What tokens `start` to `end` (a restorable length) contribute: copies of that part of the
        trimmable layers, and of the others' whole state at `end`. On the MLX thread."""
        if self.trimmable or end >= len(self.tokens):
            return [copy_layer(layer, start, end) for layer in self.cache]
        kept = self.checkpoints[end].layers
        return [
            copy_layer(layer if state is None else state, start, end)
            for layer, state in zip(self.cache, kept, strict=True)
        ]

    def branch(self, length: int) -> CacheEntry:
        """A copy of the first `length` tokens, which must be restorable. On the MLX thread."""
        return CacheEntry(
            self.tokens[:length],
            self.layers(0, length),
            {at: checkpoint for at, checkpoint in self.checkpoints.items() if at <= length},
            self.root,
            [at for at in self.turns if at <= length],
            {key: at for key, at in self.answers.items() if at <= length},
            model=self.model,
        )


class PrefixCache:
    """KV states of earlier requests to all models, found by longest common token prefix.

    Policy. A request takes the entry that gives it the most tokens. When the conversation simply
    goes on, the entry moves into the request and comes back longer; when it branches, the shared
    part is copied and the entry stays. Memory is bounded in real bytes: the least recently used
    entry goes first, where one that was never used again (a title, a sub-agent's only turn) counts
    as `ONE_OFF` seconds older, and the last thing kept of an entry is its root (system and tools),
    which every new conversation of that client shares. An entry larger than all the room there is
    keeps its beginning. An entry is named by the model's fingerprint and its tokens, and no state
    of one model is ever given to another.

    Only the MLX thread changes it. Any thread may read it: the dict of entries is replaced by
    every change."""

    ONE_OFF = 600.0

    def __init__(self, room: Callable[[], int], group: Group):
        """`room` tells how many bytes there are for it at the moment."""
        self._room, self._group = room, group
        self._entries: dict[CacheEntry, int] = {}  # with the bytes of their caches

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self._bytes(self.entries())

    def _bytes(self, entries: list[CacheEntry]) -> int:
        """What entries take together; what several of them share counts once."""
        sizes = self._entries
        shared = {checkpoint for entry in entries for checkpoint in entry.checkpoints.values()}
        return sum(sizes.get(entry, 0) for entry in entries) + sum(one.nbytes for one in shared)

    @property
    def limit(self) -> int:
        """Most bytes at the moment."""
        return max(0, self._room())

    def entries(self, model: str | None = None) -> list[CacheEntry]:
        """All entries, or those of one model."""
        return [entry for entry in self._entries if model in (None, entry.model)]

    def find(self, model: str, tokens: list[int]) -> tuple[CacheEntry | None, int]:
        """The entry that restores the longest proper prefix of `tokens`, and that length."""
        best, length = None, 0
        for entry in self.entries(model):
            shared = min(common_prefix(entry.tokens, tokens), len(tokens) - 1)
            usable = entry.restorable(shared)
            if usable > length:
                best, length = entry, usable
        return best, length

    def closest(self, model: str, tokens: list[int]) -> tuple[list[int], int]:
        """The tokens of the entry that agrees with `tokens` the longest, and how many those are."""
        pairs = (
            (entry.tokens, common_prefix(entry.tokens, tokens)) for entry in self.entries(model)
        )
        return max(pairs, key=lambda pair: pair[1], default=([], 0))

    def held(self, model: str) -> int:
        """Bytes of a model's entries."""
        return self._bytes(self.entries(model))

    def take(self, model: str, tokens: list[int]) -> CacheEntry | None:
        """The state to start from: an entry moved out of the cache or a copy of one's beginning. On
        the MLX thread."""
        entry, length = self.find(model, tokens)
        if entry is None:
            return None
        entry.hits += 1
        entry.used = time.monotonic()
        if length == len(entry.tokens):
            self._remove(entry)
            return entry
        return entry.branch(length)

    def put(self, entry: CacheEntry) -> None:
        """Files a state and makes room for it. An entry that the new one continues is dropped. On
        the MLX thread."""
        import mlx.core as mx

        mx.eval([own_buffers(layer).state for layer in entry.cache if not is_trimmable(layer)])
        if self._group.broadcast(lambda: entry.nbytes > self.limit):
            entry = self._beginning(entry)
        if not entry.tokens:
            return
        entry.used = time.monotonic()
        for old in self.entries(entry.model):
            shared = common_prefix(old.tokens, entry.tokens)
            if shared == len(old.tokens) and entry.restorable(shared) == shared:
                self._remove(old)
                entry.hits = max(entry.hits, old.hits)
            elif shared == len(entry.tokens) and old.restorable(shared) == shared:
                return
        self._add(entry)
        self.evict()

    def drop(self, model: str) -> None:
        """Forgets all of a model. On the MLX thread."""
        self._entries = {one: size for one, size in self._entries.items() if one.model != model}

    def unwritten(self, model: str) -> CacheEntry | None:
        """The model's most recently used entry that the disk cache has not got yet."""
        waiting = [entry for entry in self.entries(model) if not entry.written]
        return max(waiting, key=lambda entry: entry.used, default=None)

    def evict(self, spare: int = 0) -> None:
        """Keeps within its room, and so many bytes below. On the MLX thread."""
        while self._entries:
            at = self._group.broadcast(lambda: self._surplus(spare))
            if at is None:
                return
            victim = self.entries()[at]
            self._remove(victim)
            self._keep_root(victim)

    def _keep_root(self, entry: CacheEntry) -> None:
        """Keeps the root of an entry that is removed, unless another entry has it."""
        root = entry.root
        if not 0 < root < len(entry.tokens) or entry.restorable(root) != root:
            return
        others = self.entries(entry.model)
        if not any(common_prefix(entry.tokens, other.tokens) >= root for other in others):
            kept = entry.branch(root)
            kept.hits, kept.used, kept.written = 1, entry.used, entry.written
            self._add(kept)

    def _surplus(self, spare: int) -> int | None:
        """Which entry has to go, if one has to."""
        if self.nbytes <= self.limit - spare:
            return None
        ages = [entry.used - (0 if entry.hits else self.ONE_OFF) for entry in self._entries]
        return ages.index(min(ages))

    def _beginning(self, entry: CacheEntry) -> CacheEntry:
        """The longest beginning of an entry that fits."""
        length = self._group.broadcast(
            lambda: int(len(entry.tokens) * self.limit / entry.nbytes * 0.95)
        )
        while length := entry.restorable(length):
            shorter = entry.branch(length)
            if self._group.broadcast(functools.partial(self._fits, shorter)):
                return shorter
            length -= 1 + length // 8
        return CacheEntry([], [])

    def _fits(self, entry: CacheEntry) -> bool:
        return entry.nbytes <= self.limit

    def _add(self, entry: CacheEntry) -> None:
        self._entries = {**self._entries, entry: entry.cache_nbytes}

    def _remove(self, entry: CacheEntry) -> None:
        self._entries = {one: size for one, size in self._entries.items() if one is not entry}


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
