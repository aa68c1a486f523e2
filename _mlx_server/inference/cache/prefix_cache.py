"""KV states of earlier requests, found again by their tokens."""

from __future__ import annotations

import functools
import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from _mlx_server.inference.cache.layers import copy_layer, is_trimmable, own_buffers
from _mlx_server.inference.cache.prefix_tree import PrefixTree
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import Priority

log = logging.getLogger("mlx_server")

TOKEN_BYTES = 48  # of a token id, in an entry's list and in a tree


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
    read the tokens, `owner` whose request it did so for, the last of which had `priority`, `root`
    the length of system and tools, `turns` are the lengths at which the user's latest turns ended:
    a template that drops old thinking goes back there. `answers` tells at which length each
    remembered answer ends.

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
    owner: str = ""
    priority: Priority = Priority.NORMAL
    number: int = 0  # in the prefix cache, once it has been there
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
        return sum(int(layer.nbytes) for layer in self.cache) + TOKEN_BYTES * len(self.tokens)

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
            owner=self.owner,
            priority=self.priority,
        )

    @property
    def place(self) -> tuple[str, str]:
        """Whose states it is among."""
        return self.model, self.owner


class Match(NamedTuple):
    """What the prefix cache has of a prompt: the entry that restores the longest proper prefix, and
    that length; the tokens of an entry that agrees with the prompt the longest, and how many of
    them do."""

    entry: CacheEntry | None
    length: int
    closest: list[int]
    shared: int


class PrefixCache:
    """KV states of earlier requests to all models, found by longest common token prefix.

    Policy. A request takes the entry that gives it the most tokens. When the conversation simply
    goes on, the entry moves into the request and comes back longer; when it branches, the shared
    part is copied and the entry stays. Memory is bounded in real bytes: the least recently used
    entry goes first, where one that was never used again (a title, a sub-agent's only turn) counts
    as `ONE_OFF` seconds older and one of less important requests as `STEP` seconds for each step of
    priority, so that a flood of theirs pushes nothing out that was in use lately. The last thing
    kept of an entry is its root (system and tools), which every new conversation of that client
    shares. An entry larger than all the room there is
    keeps its beginning. An entry is named by the model's fingerprint, its owner and its tokens, and
    no state of one model or owner is ever given to another.

    Cost. Looking up, filing and evicting take time that grows with the prompt, hardly with what is
    kept: an owner's entries are in a `PrefixTree`, in which their checkpoints are marked; bytes are
    counted as entries come and go; a heap knows which entry has to go.

    Only the MLX thread changes it. Any thread may read it: entries, trees and bytes are replaced by
    every change. `version` counts the changes."""

    ONE_OFF = 600.0
    STEP = 3600.0

    def __init__(self, room: Callable[[], int], group: Group):
        """`room` tells how many bytes there are for it at the moment."""
        self._room, self._group = room, group
        self.version = 0
        self._count = 0  # entries that have ever been here, which numbers them
        self._entries: dict[int, CacheEntry] = {}  # by number
        self._trees: dict[tuple[str, str], PrefixTree[CacheEntry]] = {}  # by model and owner
        self._bytes: dict[str, int] = {}  # by model; what several entries share counts once
        # For the MLX thread: bytes without checkpoints by number, entries that hold a checkpoint,
        # and by age the numbers of all entries, some of them out of date.
        self._sizes: dict[int, int] = {}
        self._holders: dict[Checkpoint, int] = {}
        self._ages: list[tuple[float, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(self._bytes.values())

    @property
    def limit(self) -> int:
        """Most bytes at the moment."""
        return max(0, self._room())

    def entries(self, model: str | None = None) -> list[CacheEntry]:
        """All entries, or those of one model."""
        return [entry for entry in self._entries.values() if model in (None, entry.model)]

    def find(self, model: str, tokens: list[int], owner: str = "") -> Match:
        """What there is of an owner's prompt."""
        tree = self._trees.get((model, owner), _EMPTY)
        path, end, shared = tree.walk(tokens)
        sample = end.sample
        if sample is None:
            return Match(None, 0, [], 0)
        entry: CacheEntry | None = sample
        length = min(shared, len(tokens) - 1)
        if not sample.trimmable:
            usable = (pair for pair in reversed(path) if pair[1] <= length and _restores(pair[0]))
            node, length = next(usable, (tree, 0))
            entry = node.value or next(iter(node.marks), None)
        if length <= 0:
            return Match(None, 0, sample.tokens, shared)
        return Match(entry, length, sample.tokens, shared)

    def held(self, model: str) -> int:
        """Bytes of a model's entries."""
        return self._bytes.get(model, 0)

    def take(self, match: Match) -> CacheEntry | None:
        """The state to start from: the entry that was found, moved out of the cache, or a copy of
        its beginning. On the MLX thread."""
        entry, length = match.entry, match.length
        if entry is None:
            return None
        entry.hits += 1
        entry.used = time.monotonic()
        if length == len(entry.tokens):
            self._remove(entry)
            return entry
        self._note_age(entry)
        return entry.branch(length)

    def put(self, entry: CacheEntry) -> None:
        """Files a state and makes room for it. An entry that the new one continues is dropped. On
        the MLX thread."""
        import mlx.core as mx

        own = [layer if is_trimmable(layer) else own_buffers(layer) for layer in entry.cache]
        mx.eval([layer.state for layer in own])  # what is not computed yet holds what it comes from
        if self._group.broadcast(lambda: entry.nbytes > self.limit):
            entry = self._beginning(entry)
        if not entry.tokens or self._is_continued(entry):
            return
        entry.used = time.monotonic()
        tree = self._trees.get(entry.place, _EMPTY)
        for node, length in tree.walk(entry.tokens).path:
            if (old := node.value) is not None and entry.restorable(length) == length:
                self._remove(old)
                entry.hits = max(entry.hits, old.hits)
        self._add(entry)
        self.evict()

    def _is_continued(self, entry: CacheEntry) -> bool:
        """Whether a longer entry can give all of this one."""
        total = len(entry.tokens)
        path, end, shared = self._trees.get(entry.place, _EMPTY).walk(entry.tokens)
        if shared < total:
            return False
        if entry.trimmable:
            return end.sample is not None and len(end.sample.tokens) > total
        return end is path[-1][0] and any(len(one.tokens) > total for one in end.marks)

    def drop(self, model: str) -> None:
        """Forgets all of a model. On the MLX thread."""
        for entry in self.entries(model):
            self._forget(entry)
        self._entries = {at: one for at, one in self._entries.items() if one.model != model}
        self._trees = {place: tree for place, tree in self._trees.items() if place[0] != model}
        self._bytes = {name: size for name, size in self._bytes.items() if name != model}
        self.version += 1

    def unwritten(self, model: str) -> CacheEntry | None:
        """The model's most recently used entry that the disk cache has not got yet."""
        waiting = [entry for entry in self.entries(model) if not entry.written]
        return max(waiting, key=lambda entry: entry.used, default=None)

    def evict(self, spare: int = 0) -> None:
        """Keeps within its room, and so many bytes below. On the MLX thread."""
        while self._entries:
            number = self._group.broadcast(lambda: self._surplus(spare))
            if number is None:
                return
            victim = self._entries[number]
            self._remove(victim)
            self._keep_root(victim)

    def _keep_root(self, entry: CacheEntry) -> None:
        """Keeps the root of an entry that is removed, unless another entry has it."""
        root = entry.root
        if not 0 < root < len(entry.tokens) or entry.restorable(root) != root:
            return
        tree = self._trees.get(entry.place, _EMPTY)
        if tree.walk(entry.tokens[:root]).shared < root:
            kept = entry.branch(root)
            kept.hits, kept.used, kept.written = 1, entry.used, entry.written
            self._add(kept)

    def _surplus(self, spare: int) -> int | None:
        """The number of the entry that has to go, if one has to."""
        if self.nbytes <= self.limit - spare:
            return None
        while True:
            age, number = self._ages[0]
            entry = self._entries.get(number)
            if entry is not None and self._age(entry) == age:
                return number
            heapq.heappop(self._ages)

    def _age(self, entry: CacheEntry) -> float:
        return entry.used - (0 if entry.hits else self.ONE_OFF) - self.STEP * entry.priority

    def _note_age(self, entry: CacheEntry) -> None:
        """Comes after each change of an entry's age."""
        if len(self._ages) > 2 * len(self._entries) + 64:
            self._ages = [(self._age(one), one.number) for one in self._entries.values()]
            heapq.heapify(self._ages)
        heapq.heappush(self._ages, (self._age(entry), entry.number))

    def _beginning(self, entry: CacheEntry) -> CacheEntry:
        """The longest beginning of an entry that fits."""
        length = self._group.broadcast(
            lambda: int(len(entry.tokens) * self.limit / entry.nbytes * 0.95)
        )
        while length := entry.restorable(length):
            shorter = entry.branch(length)
            if self._group.broadcast(functools.partial(self._fits, shorter)):
                log.info(
                    "the prompt cache has %s, and a conversation takes %s: "
                    "it is kept up to token %d of %d",
                    gigabytes(self.limit),
                    gigabytes(entry.nbytes),
                    length,
                    len(entry.tokens),
                )
                return shorter
            length -= 1 + length // 8
        return CacheEntry([], [])

    def _fits(self, entry: CacheEntry) -> bool:
        return entry.nbytes <= self.limit

    def _add(self, entry: CacheEntry) -> None:
        self._count += 1
        entry.number = self._count
        size = self._sizes[entry.number] = entry.cache_nbytes
        tree = self._trees.get(entry.place, _EMPTY).put(entry.tokens, entry)
        for length, checkpoint in entry.checkpoints.items():
            tree = tree.mark(entry.tokens[:length], entry)
            holders = self._holders.get(checkpoint, 0)
            self._holders[checkpoint] = holders + 1
            size += 0 if holders else checkpoint.nbytes
        self._entries = {**self._entries, entry.number: entry}
        self._set_tree(entry.place, tree, size)
        self._note_age(entry)

    def _remove(self, entry: CacheEntry) -> None:
        tree = self._trees[entry.place].remove(entry.tokens)
        for length in entry.checkpoints:
            tree = tree.unmark(entry.tokens[:length], entry)
        entries = self._entries.copy()
        del entries[entry.number]
        self._entries = entries
        self._set_tree(entry.place, tree, -self._forget(entry))

    def _forget(self, entry: CacheEntry) -> int:
        """Takes an entry that goes out of the counts; returns the bytes that no other one holds."""
        size = self._sizes.pop(entry.number)
        for checkpoint in entry.checkpoints.values():
            self._holders[checkpoint] -= 1
            if not self._holders[checkpoint]:
                del self._holders[checkpoint]
                size += checkpoint.nbytes
        return size

    def _set_tree(self, place: tuple[str, str], tree: PrefixTree[CacheEntry], growth: int) -> None:
        """Sets an owner's tree, and the model's bytes to so many more."""
        model, _ = place
        self._trees = {**self._trees, place: tree}
        self._bytes = {**self._bytes, model: self._bytes.get(model, 0) + growth}
        self.version += 1


_EMPTY: PrefixTree[CacheEntry] = PrefixTree()


def _restores(node: PrefixTree[CacheEntry]) -> bool:
    """Whether an entry can give exactly the tokens of a node."""
    return node.value is not None or bool(node.marks)
