"""The groups of requests that decode together: who shares one, what it holds, what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from _mlx_server.inference.cache.prefix_cache import CacheEntry
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.decoding.decode_batch import DecodeBatch, Row
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from engine import Library

STEP = 256  # positions by which mlx-lm's caches grow


@pytest.fixture(autouse=True)
def nothing_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeBatch, "LEAST", 0)


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    local: LocalModel = Library([folder]).resolve("qwen2")
    return Weights(local, None, Group())


def batch_of(weights: Weights, size: int = 0) -> DecodeBatch:
    return DecodeBatch(weights.model, [2], size, weights.state_size, Group())


def entry(weights: Weights, length: int) -> CacheEntry:
    """A state of so many tokens, made of noise that depends on the length."""
    import mlx.core as mx

    cache = weights.new_cache()
    for at, layer in enumerate(cache):
        keys, values = (
            mx.random.normal((1, 2, length, 16), key=mx.random.key(length + at + n)) for n in (0, 9)
        )
        layer.update_and_fetch(keys, values)
    mx.eval([layer.state for layer in cache])
    return CacheEntry([5] * length, cache)


def insert(batch: DecodeBatch, one: CacheEntry, room: int | None = 1 << 40) -> int:
    return batch.insert([Row(one, [*one.tokens, 7], 1000, greedy, [])], room)[0]


def greedy(logprobs: Any) -> Any:
    return logprobs.argmax(axis=-1)


def steps(batch: DecodeBatch, count: int) -> dict[int, list[int]]:
    """So many tokens of each request, by number."""
    written: dict[int, list[int]] = {}
    for _ in range(count * batch.groups):
        for response in batch.step():
            written.setdefault(response.uid, []).append(response.token)
    return written


def shared(batch: DecodeBatch, *numbers: int) -> bool:
    """Whether these requests are in one group."""
    return len({id(batch.find(number)[0]) for number in numbers}) == 1


def test_requests_of_like_length_share_a_group_and_answer_as_if_alone(weights: Weights):
    lengths = [4000, 50, 60, 3900, 55]
    alone = []
    for length in lengths:
        batch = batch_of(weights)
        insert(batch, entry(weights, length))
        alone += steps(batch, 12).values()
    batch = batch_of(weights)
    numbers = [insert(batch, entry(weights, length)) for length in lengths]
    assert batch.groups == 2
    assert shared(batch, numbers[0], numbers[3]) and shared(batch, *numbers[1:3], numbers[4])
    written = steps(batch, 6)
    batch.discard(numbers[3])
    for number, tokens in steps(batch, 6).items():
        written[number] += tokens
    assert [written[number] for number in numbers if number != numbers[3]] == [
        *alone[:3],
        alone[4],
    ]
    assert written[numbers[3]] == alone[3][:6]


def test_a_long_conversation_is_neither_copied_nor_padded_beside_short_ones(weights: Weights):
    batch, long = batch_of(weights), entry(weights, 4000)
    layers = list(long.cache)
    number = insert(batch, long)
    shorts = [insert(batch, entry(weights, 40 + n)) for n in range(15)]
    steps(batch, 2)
    held = [batch.find(one)[0] for one in (number, shorts[0])]
    allocated = sum(layer.nbytes for group in held for layer in group.prompt_cache)
    rows = [len(tokens) for group in held for tokens in group.tokens]
    own = sum(map(weights.state_size.nbytes, rows))
    growing = len(rows) * weights.state_size.nbytes(STEP)
    assert batch.groups == 2 and batch.padding <= own / 4
    assert own <= allocated <= own + batch.padding + growing
    for one in shorts:
        batch.discard(one)
        steps(batch, 1)
    tokens, cache = batch.remove(number)
    assert len(tokens) == len(long.tokens) + 18
    assert all(before is after for before, after in zip(layers, cache, strict=True))


def test_the_last_one_of_a_group_goes_on_with_caches_of_its_own(weights: Weights):
    batch = batch_of(weights)
    first, second = (insert(batch, entry(weights, 100 + n)) for n in range(2))
    steps(batch, 3)
    batch.discard(first)
    group, _ = batch.find(second)
    assert group.in_place and group.prompt_cache[0].offset == 101 + 4
    third = insert(batch, entry(weights, 100))
    assert shared(batch, second, third) and len(steps(batch, 3)) == 2


def test_padding_that_costs_less_than_reading_the_weights_again_is_taken(weights: Weights):
    size = 8 * weights.state_size.nbytes(60)
    batch = batch_of(weights, size)
    first, second, third = (insert(batch, entry(weights, length)) for length in (10, 65, 300))
    assert shared(batch, first, second) and not shared(batch, first, third)


def test_there_is_no_more_padding_than_room(weights: Weights):
    batch, room = batch_of(weights), weights.state_size.nbytes(5)
    first, second, third = (insert(batch, entry(weights, n), room) for n in (100, 105, 90))
    assert shared(batch, first, second) and not shared(batch, first, third)
    assert batch.padding == room


def test_a_group_that_is_closed_stays_so(weights: Weights):
    batch = batch_of(weights)
    first = insert(batch, entry(weights, 100), None)
    second = insert(batch, entry(weights, 100))
    assert not shared(batch, first, second)


def test_what_fails_in_one_group_costs_the_other_nothing(weights: Weights):
    batch = batch_of(weights)
    long, *shorts = (insert(batch, entry(weights, n)) for n in (4000, 50, 52))
    steps(batch, 1)
    group, at = batch.find(shorts[1])

    def fails(logprobs: Any) -> Any:
        raise RuntimeError

    group.samplers[at] = fails
    with pytest.raises(RuntimeError):
        steps(batch, 1)
    assert {number: len(read) for number, read in batch.drop_failed().items()} == {
        shorts[0]: 52,
        shorts[1]: 54,
    }
    assert set(steps(batch, 3)) == {long}


def test_groups_take_turns_and_what_has_begun_is_next_but_never_twice_in_a_row(weights: Weights):
    batch = batch_of(weights)
    short, long = (insert(batch, entry(weights, length)) for length in (50, 4000))

    def turn() -> set[int]:
        return {response.uid for response in batch.step()}

    assert [turn() for _ in range(4)] == [{long}, {short}] * 2
    late = insert(batch, entry(weights, 300))
    assert [turn() for _ in range(4)] == [{late}, {long}, {short}, {late}]
    assert turn() == {long}
    second = insert(batch, entry(weights, 51))
    assert turn() == {short, second}
    third = insert(batch, entry(weights, 52))
    assert [turn() for _ in range(3)] == [{late}, {long}, {short, second, third}]
