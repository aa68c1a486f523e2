"""What costs grow with: the prompt, and not what is kept in memory, on disk or in folders. Work is
counted in steps of the interpreter, so that a busy machine changes nothing."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from _mlx_server.inference.group import Group
from _mlx_server.inference.prefix_cache import CacheEntry, Checkpoint, PrefixCache
from _mlx_server.inference.prefix_tree import common_prefix

ROOM = 1 << 40


def work(call: Callable[[], Any]) -> int:
    """How many instructions of the interpreter a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def agreed(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share, found the plain way."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Layer:
    """A layer that cannot be trimmed."""

    def __init__(self, nbytes: int):
        self.nbytes, self.state = nbytes, []


def recurrent(tokens: list[int], marks: list[int]) -> CacheEntry:
    """The state of a model that goes back only to checkpoints, which are at these lengths."""
    checkpoints = {at: Checkpoint([Layer(7 + at)]) for at in marks}
    return CacheEntry(tokens, [Layer(100)], checkpoints)


def plain(tokens: list[int], marks: list[int]) -> CacheEntry:
    """The state of a model that can be cut back to any length."""
    from mlx.core import zeros
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    cache.update_and_fetch(*[zeros((1, 1, len(tokens), 1))] * 2)
    return CacheEntry(tokens, [cache])


# ---- the prefix cache


def test_two_lists_share_what_they_share():
    dice = random.Random(1)
    for _ in range(3000):
        a = [dice.randrange(2) for _ in range(dice.choice([0, 3, 63, 64, 65, 200, 500]))]
        b = a[: dice.randrange(len(a) + 1)] + [dice.randrange(2) for _ in range(dice.randrange(9))]
        start = dice.randrange(4)
        assert common_prefix(a, [7] * start + b, start) == agreed(a, b)


@pytest.mark.parametrize("make", [plain, recurrent])
def test_what_is_found_filed_and_evicted_is_what_a_search_through_all_entries_finds(make: Any):
    dice, limit = random.Random(2), 5000
    cache = PrefixCache(lambda: limit, Group())

    def tokens() -> list[int]:
        """Few values, so that lists often begin alike, and often like one that is there."""
        known = dice.choice(entries).tokens if entries and dice.random() < 0.8 else []
        return known[: dice.randrange(len(known) + 1)] + [
            dice.randrange(2) for _ in range(dice.randrange(1, 40))
        ]

    for step in range(1500):
        entries = cache.entries()
        prompt, model = tokens(), dice.choice("ab")
        match = cache.find(model, prompt)
        known = [entry for entry in entries if entry.model == model]
        shared = [agreed(entry.tokens, prompt) for entry in known]
        usable = [
            entry.restorable(min(at, len(prompt) - 1))
            for entry, at in zip(known, shared, strict=True)
        ]
        assert match.length == max(usable, default=0)
        assert match.shared == max(shared, default=0) == agreed(match.closest, prompt)
        if match.entry is not None:
            assert match.entry.restorable(match.length) == match.length
            assert match.entry.tokens[: match.length] == prompt[: match.length]
        if dice.random() < 0.5 and match.entry is not None:
            entry = cache.take(match)
            assert entry.tokens == prompt[: match.length]
            entry.tokens = prompt
            if make is plain:
                entry.cache = plain(prompt, []).cache
        else:
            entry = make(prompt, sorted({dice.randrange(1, len(prompt) + 1) for _ in range(3)}))
        entry.model, entry.root = model, dice.randrange(len(prompt) + 1)
        cache.put(entry)
        limit = dice.choice([5000, 20000])
        if step % 97 == 0:
            cache.drop(dice.choice("ab"))
        entries = cache.entries()
        checkpoints = {one for entry in entries for one in entry.checkpoints.values()}
        counted = sum(entry.cache_nbytes for entry in entries)
        assert cache.nbytes == counted + sum(one.nbytes for one in checkpoints)
        assert cache.nbytes == cache.held("a") + cache.held("b")
    cache.evict(spare=1 << 50)
    assert cache.nbytes == 0 and not cache.entries()
    assert cache.find("a", [0] * 9)[:2] == (None, 0)


def conversations(count: int, make: Any) -> PrefixCache:
    """So many conversations with one root, each of which parts from the others at once."""
    cache, root = PrefixCache(lambda: ROOM, Group()), [1] * 1000
    for number in range(count):
        tokens = [*root, 2, *[10 + number] * 100]
        entry = make(tokens, [1000, 1050])
        entry.root = 1000
        cache.put(entry)
    return cache


@pytest.mark.parametrize("make", [plain, recurrent])
def test_a_prompt_costs_the_same_beside_three_conversations_and_beside_five_hundred(make: Any):
    costs = []
    for count in (3, 500):
        cache = conversations(count, make)
        prompts = [cache.entries()[-1].tokens + [9] * 10, [1] * 1000 + [2, 5, 5], [8] * 1000]
        found = [cache.find("", prompt)[1] for prompt in prompts]
        assert found[0] == 1101 and found[1] >= 1000 and found[2] == 0
        costs.append([work(lambda p=prompt, c=cache: c.find("", p)) for prompt in prompts])
        new = make([1] * 1000 + [2, 6, 6, 6], [1000])
        costs[-1].append(work(lambda e=new, c=cache: c.put(e)))
        costs[-1].append(work(lambda c=cache: c.evict(ROOM - c.nbytes + 1)))
        costs[-1].append(work(lambda c=cache: (c.nbytes, c.held(""), c.evict())))
    for few, many in zip(*costs, strict=True):
        assert many <= 1.2 * few
