"""Prompts that are read together: which ones are, that it changes no answer, what a failure
costs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from bench_together import AGENTS, PREFIX, fill
from conftest import kinds
from models import build_model
from test_engine import REREAD, SYSTEM, answer, cold, user

from _mlx_server.inference.cache.layers import is_trimmable
from _mlx_server.inference.decoding.decode_batch import DecodeBatch
from _mlx_server.inference.speculation.pass_costs import PassCosts
from engine import Engine, EngineError, Generation, Priority, Request


@pytest.fixture(scope="module", params=kinds("llama_sliding"))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(str(folder / request.param), speculation=False) as engine:  # measures no passes
        yield engine


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Engine]:
    with Engine(str(folder / "qwen2"), speculation=False) as engine:
        yield engine


@contextlib.contextmanager
def at_once(engine: Engine) -> Iterator[list[tuple[int, ...]]]:
    """What is submitted meanwhile comes in one step of an engine whose cache is empty. Gives the
    shapes (prompts, tokens) of the passes that read it."""
    shapes: list[tuple[int, ...]] = []
    engine.unload(engine.default.name)
    go = threading.Event()

    def wait(logprobs: Any) -> Any:
        go.wait(60)
        return logprobs.argmax(axis=-1)

    first = engine.submit(Request("default", prompt=[9], max_tokens=1))
    first.sequence.sampler = wait
    while not engine.pool.runners:
        next(first)
    model = model_of(engine)

    def watched(tokens: Any, cache: Any) -> Any:
        if tokens.shape[1] > 1:
            shapes.append(tokens.shape)
        return model(tokens, cache=cache)

    put_in_place(engine, watched)
    yield shapes
    go.set()
    list(first)


def model_of(engine: Engine) -> Any:
    return engine.pool.runners[engine.default.name].weights.model


def put_in_place(engine: Engine, wrapper: Any) -> None:
    """Reads with a function around the model from here on."""
    model = model_of(engine)
    wrapper.layers = model.layers
    if hasattr(model, "make_cache"):
        wrapper.make_cache = model.make_cache
    runner = engine.pool.runners[engine.default.name]
    runner.weights.model = runner.decode_batch.model = wrapper


def raw(engine: Engine, prompt: list[int], **fields: Any) -> Generation:
    return engine.submit(Request("default", prompt=prompt, **{"max_tokens": 8, **fields}))


def text(generation: Generation) -> str:
    return "".join(generation.text())


def tokens(count: int, seed: int) -> list[int]:
    """A prompt that shares no beginning with those of other seeds."""
    return [10 + (seed * 31 + at * (7 + seed)) % 400 for at in range(count)]


@pytest.mark.slow
def test_what_comes_at_once_is_read_together_and_goes_on_as_if_alone(engine: Engine):
    talks = [[SYSTEM, user(f"{n} number {n} " * (2 + n % 3))] for n in range(5)]
    alone = [cold(engine, talk, max_tokens=12) for talk in talks]
    engine.unload(engine.default.name)
    before = engine.stats().totals.prefill_passes
    answer(engine, talks[0], max_tokens=12)
    one = engine.stats().totals.prefill_passes - before
    with at_once(engine) as shapes:
        running = [engine.chat(talk, max_tokens=12) for talk in talks]
    assert [text(generation) for generation in running] == alone
    assert engine.stats().totals.prefill_passes - before - one == len(shapes) <= 2 * one
    for talk, said in list(zip(talks, alone, strict=True))[:2]:
        talk += [{"role": "assistant", "content": said}, user("go on")]
        warm, generation = answer(engine, talk, max_tokens=12)
        assert generation.usage.cached_tokens > 2 * generation.usage.prompt_tokens / 3
        assert warm == cold(engine, talk, max_tokens=12)


def test_a_short_prompt_is_read_in_one_pass_or_two_with_a_restore_point(engine: Engine):
    with at_once(engine) as shapes:
        runner = engine.pool.runners[engine.default.name]
        trimmable = all(map(is_trimmable, runner.weights.new_cache()))
        generation = engine.chat([user("hello")], max_tokens=4)
    before = text(generation)
    assert len(shapes) == (1 if trimmable else 2)
    prompt = generation.usage.prompt_tokens
    assert sum(length for _, length in shapes) == prompt
    assert generation.usage.prefilled_tokens == prompt - 1
    again, generation = answer(engine, [user("hello")], max_tokens=4)
    assert again == before and generation.usage.cached_tokens >= prompt - REREAD


@pytest.mark.parametrize("widest, length", [(1.5, 40), (400.0, 39), (None, 40)])
def test_a_prompts_end_is_read_with_the_answers_first_pass_where_that_is_quicker(
    folder: Path, widest: float | None, length: int
):
    """`widest` is how long a pass of 32 tokens takes, one of a single token being 1, if that is
    known."""
    with Engine(str(folder / "qwen2")) as engine:
        with at_once(engine) as shapes:
            speculation = engine.pool.runners[engine.default.name].speculation
            speculation.costs = PassCosts({1: 1.0, 32: widest} if widest else None)
            generation = raw(engine, tokens(40, 1))
        text(generation)
    assert shapes[0] == (1, length)


@pytest.mark.slow
def test_only_the_prompt_that_cannot_be_read_fails(plain: Engine):
    prompts = [tokens(40, n) for n in range(4)]
    alone = [text(raw(plain, prompt)) for prompt in prompts]
    with at_once(plain) as shapes:
        model = model_of(plain)

        def fails(read: Any, cache: Any) -> Any:
            out = model(read, cache=cache)
            if (read == 500).any().item():
                raise MemoryError("no more room")
            return out

        put_in_place(plain, fails)
        running = [raw(plain, prompt) for prompt in prompts]
        victim = raw(plain, [*tokens(20, 4), 500, *tokens(20, 4)])
    assert [text(generation) for generation in running] == alone
    with pytest.raises(EngineError, match="try again"):
        list(victim)
    assert shapes[0] == (5, 41) and all(rows == 1 for rows, _ in shapes[1:])


@pytest.mark.slow
def test_what_a_cancelled_prompt_has_read_with_others_is_kept(plain: Engine):
    prompts = [tokens(60 + n, n) for n in range(4)]
    alone = [text(raw(plain, prompt)) for prompt in prompts]
    with at_once(plain):
        model = model_of(plain)

        def cancels(read: Any, cache: Any) -> Any:
            if read.shape[1] > 1:
                running[0].cancel()
            return model(read, cache=cache)

        put_in_place(plain, cancels)
        running = [raw(plain, prompt) for prompt in prompts]
    assert [text(generation) for generation in running[1:]] == alone[1:]
    list(running[0])
    again = raw(plain, prompts[0])
    assert text(again) == alone[0] and again.usage.cached_tokens >= 59


@pytest.mark.slow
def test_sub_agents_behind_a_long_prefix_take_as_many_passes_as_one(tmp_path: Path):
    path = build_model("", tmp_path / "agents", config=AGENTS)
    prefix = tokens(PREFIX, 0)
    with Engine(str(path)) as engine:
        said, passes = [], []
        for count in (8, 1):
            with at_once(engine) as shapes:
                mx.random.seed(1)
                fill(engine, prefix)
                running = [raw(engine, [*prefix, *tokens(200, 1 + n)]) for n in range(count)]
            said.append([text(generation) for generation in running])
            assert running[-1].usage.cached_tokens == PREFIX
            passes.append(shapes)
    assert passes == [[(8, 199)], [(1, 199)]]
    assert said[0][0] == said[1][0]


@pytest.mark.slow
def test_who_is_read_with_whom(plain: Engine, monkeypatch: pytest.MonkeyPatch):
    with at_once(plain) as shapes:
        running = [
            raw(plain, tokens(20, n), priority=Priority.LOW if n % 2 else Priority.HIGH)
            for n in range(6)
        ]
    for generation in running:
        list(generation)
    assert shapes == [(3, 20), (3, 20)]  # the important ones first
    assert running[0].usage.completion_tokens == 8

    with at_once(plain) as shapes:
        running = [raw(plain, tokens(count, count)) for count in (420, 20, 23, 300)]
    for generation in running:
        list(generation)
    assert shapes == [(2, 23), (1, 299), (1, 419)] or shapes == [(2, 23), (1, 419), (1, 299)]

    twin = tokens(600, 1)
    with at_once(plain) as shapes:
        running = [raw(plain, [*twin, *tokens(20, n)]) for n in range(3)]
    for generation in running:
        list(generation)
    assert shapes == [(1, 512), (1, 107), (2, 20)]

    monkeypatch.setattr(DecodeBatch, "LEAST", 0)  # as with states that are large beside the weights
    with at_once(plain) as shapes:
        running = [raw(plain, tokens(220, n)) for n in range(2)]
    for generation in running:
        list(generation)
    assert shapes == [(1, 219), (1, 219)]
