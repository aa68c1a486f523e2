"""Many requests at once: who goes first, what they share, what a failure costs, and what memory
allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import kinds
from phases import Phases
from test_engine import REREAD, SYSTEM, answer, cold, user

from _mlx_server.inference.decoding.decode_batch import DecodeBatch
from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.decoding.runner import ModelRunner
from _mlx_server.inference.memory import StateSize
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.scheduler import Scheduler
from _mlx_server.inference.sequence import State
from engine import (
    Done,
    Engine,
    EngineBusy,
    Generation,
    ModelLoadError,
    Priority,
    PromptTooLong,
    Request,
    Sampling,
    Text,
)


@pytest.fixture(scope="module", params=kinds("qwen2"))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(str(folder / request.param)) as engine:
        yield engine


def runtime(engine: Engine) -> ModelRunner:
    return engine.pool.runners[engine.default.name]


def text(generation: Generation) -> str:
    return "".join(generation.text())


def begin(generation: Generation) -> str:
    """Waits for the first words of an answer."""
    return next(event.text for event in generation if isinstance(event, Text))


def until(generation: Generation, phase: State) -> None:
    """Waits, event by event, until a request is in a phase."""
    while generation.sequence.state is not phase:
        assert not isinstance(next(generation), Done)


# ------------------------------------------------------------------ company


@pytest.mark.slow
def test_a_greedy_answer_is_the_same_alone_and_in_a_batch_of_eight(engine: Engine):
    prompts = [f"number {n} " * (3 * n + 1) for n in range(8)]
    alone = [answer(engine, prompt, max_tokens=20 + n)[0] for n, prompt in enumerate(prompts)]
    engine.unload(engine.default.name)
    together = [engine.chat(prompt, max_tokens=20 + n) for n, prompt in enumerate(prompts)]
    assert [text(generation) for generation in together] == alone


@pytest.mark.slow
def test_requests_with_other_limits_stops_and_sampling_run_side_by_side(engine: Engine):
    whole, _ = answer(engine, "stop", max_tokens=24)
    stop = whole[len(whole) // 2 :][:2]
    engine.unload(engine.default.name)
    plain, short = engine.chat("stop", max_tokens=24), engine.chat("stop", max_tokens=3)
    stopped = engine.chat("stop", max_tokens=24, stop=[stop])
    dice = [
        engine.chat("dice", max_tokens=24, sampling=Sampling(temperature=1.0, seed=n))
        for n in (1, 1, 2)
    ]
    assert text(plain) == whole
    assert whole.startswith(text(short)) and short.usage.completion_tokens == 3
    assert list(stopped)[-1].stop_sequence == stop
    one, same, other = map(text, dice)
    assert one == same != other


@pytest.mark.slow
def test_kv_that_cannot_be_batched_decodes_side_by_side_all_the_same(folder: Path):
    with Engine(str(folder / "qwen3"), kv_bits=8) as engine:
        expected = [answer(engine, f"number {n}")[0] for n in range(3)]
        endless = Sampling(logit_bias={2: -100.0})
        company = engine.chat("company", max_tokens=4000, sampling=endless)
        until(company, State.DECODE)
        together = [engine.chat(f"number {n}", max_tokens=16) for n in range(3)]
        assert [text(generation) for generation in together] == expected
        assert company.sequence.state is State.DECODE
        company.cancel()


@pytest.mark.slow
def test_a_long_conversation_keeps_its_state_while_short_ones_come_and_go(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(DecodeBatch, "SPARE", 0)
    monkeypatch.setattr(DecodeBatch, "LEAST", 0)
    short = [answer(engine, f"number {n}", max_tokens=12)[0] for n in range(3)]
    expected, _ = answer(engine, "long " * 400, max_tokens=60)
    engine.unload(engine.default.name)
    long = engine.chat("long " * 400, max_tokens=4000)
    begin(long)
    group, _ = runtime(engine).decode_batch.find(long.sequence.number)
    layers = list(group.prompt_cache)
    for _ in range(2):
        together = [engine.chat(f"number {n}", max_tokens=12) for n in range(3)]
        assert [text(generation) for generation in together] == short
    assert group.in_place and all(map(lambda *pair: pair[0] is pair[1], layers, group.prompt_cache))
    while long.usage.completion_tokens < 70:  # the text of the last ones may be still to come
        next(long)
    assert long.sequence.raw.startswith(expected.rstrip("\ufffd"))  # half a letter
    long.cancel()


@pytest.mark.slow
def test_forty_requests_decode_side_by_side(folder: Path):
    endless = Sampling(logit_bias={2: -100.0})
    prompts = [f"number {n}" for n in range(40)]
    with Engine(str(folder / "qwen2")) as engine:
        expected = [answer(engine, one, max_tokens=8, sampling=endless)[0] for one in prompts]
        running = [engine.chat(one, max_tokens=4000, sampling=endless) for one in prompts]
        for generation in running:
            until(generation, State.DECODE)
        assert len(runtime(engine).decoding()) == 40
        for generation, said in zip(running, expected, strict=True):
            while generation.usage.completion_tokens < 8:
                next(generation)
            assert generation.sequence.raw.startswith(said.rstrip("\ufffd"))  # half a letter
            generation.cancel()


@pytest.mark.slow
def test_two_models_answer_at_the_same_time(folder: Path):
    with Engine(models_dirs=[folder]) as engine:
        first = engine.submit(Request("qwen2", [user("begin")], max_tokens=4000))
        begin(first)
        assert (
            list(engine.submit(Request("qwen3", [user("hi")], max_tokens=3)))[-1].reason == "length"
        )
        assert first.sequence.state is State.DECODE
        assert {loaded.model.name for loaded in engine.loaded()} == {"qwen2", "qwen3"}
        first.cancel()


# ------------------------------------------------------------------ whose turn it is


def chunks_until(schedule: Scheduler, jobs: list[Any], wanted: Any) -> int:
    """Chunks that are prefilled until a request has read its prompt."""
    count = 0
    while wanted.left > 0:
        schedule.choose([job for job in jobs if job.left > 0], []).read()
        count += 1
    return count


class Waiting:
    """A request as the schedule sees it."""

    def __init__(self, tokens: int, born: float, priority: Priority = Priority.NORMAL):
        self.left, self.submitted, self.passed_over = tokens, born, 0
        self.request = Request("", priority=priority)

    def read(self) -> None:
        self.left = max(0, self.left - PromptReader.CHUNK)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    long, short = Waiting(13000, 0), Waiting(50, 1)
    assert chunks_until(Scheduler(), [long, short], short) == 1


def test_a_long_prompt_is_not_starved_by_short_ones():
    long, schedule = Waiting(5120, 0), Scheduler()
    count = 0
    while long.left > 0:
        schedule.choose([long, Waiting(50, count + 1)], []).read()
        count += 1
    assert count == 10 * (Scheduler.PATIENCE + 1)


def test_equals_are_served_in_the_order_they_came():
    first, second = Waiting(10000, 0), Waiting(9000, 1)
    assert chunks_until(Scheduler(), [second, first], first) == 20
    assert second.left == 9000


def test_higher_priority_goes_first_and_lower_work_waits_for_it():
    low, high = Waiting(600, 0, Priority.LOW), Waiting(13000, 1, Priority.HIGH)
    assert chunks_until(Scheduler(), [low, high], high) == 26
    assert low.left == 600


@pytest.mark.parametrize(
    "priority, steps", [(Priority.HIGH, 0), (Priority.NORMAL, 4), (Priority.LOW, 12)]
)
def test_answers_go_on_while_a_prompt_is_read(priority: Priority, steps: int):
    schedule, decoding, reader = Scheduler(), [Waiting(0, 0)], Waiting(9000, 1, priority)
    schedule.prefilled(schedule.choose([reader], decoding), [], 1.0, decoding)
    taken = 0
    while schedule.choose([reader], decoding) is None:
        schedule.decoded(0.25)
        taken += 1
    assert taken == steps


@pytest.mark.slow
def test_a_short_request_is_answered_while_a_long_prompt_is_prefilled(
    engine: Engine, phases: Phases
):
    engine.unload(engine.default.name)  # no part of it is to be in the cache
    held = phases.hold(State.PREFILL)
    long = engine.chat("long " * 600, max_tokens=1)
    with held:
        short = engine.chat("short", max_tokens=2)
    assert list(short)[-1].usage.completion_tokens == 2
    assert list(long)[-1].reason == "length"
    assert phases.when(short, State.ENDED) < phases.when(long, State.DECODE)


@pytest.mark.slow
def test_an_important_request_overtakes_and_the_other_keeps_what_it_has(
    engine: Engine, phases: Phases
):
    engine.unload(engine.default.name)
    held = phases.hold(State.PREFILL)
    low = engine.chat("low " * 600, max_tokens=2, priority=Priority.LOW)
    with held:
        high = engine.chat("high " * 200, max_tokens=2, priority=Priority.HIGH)
    assert text(high)
    expected = text(low)
    assert phases.when(high, State.ENDED) < phases.when(low, State.DECODE)
    assert low.usage.cached_tokens < 10
    assert cold(engine, "low " * 600, max_tokens=2) == expected


@pytest.mark.slow
def test_a_twin_that_comes_while_the_first_is_read_does_not_read_it_again(engine: Engine):
    messages = [SYSTEM, user("twin " * 200)]
    engine.unload(engine.default.name)
    first, second = (engine.chat(messages, max_tokens=2) for _ in range(2))
    assert text(first) == text(second)
    assert second.usage.cached_tokens >= second.usage.prompt_tokens - REREAD


# ------------------------------------------------------------------ a full house


def test_a_full_batch_keeps_nobody_waiting_who_is_more_important(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelRunner, "ROWS", 2)
    with Engine(str(folder / "qwen2")) as engine:
        running = [engine.chat(f"long {n}", max_tokens=4000, priority=Priority.LOW) for n in "ab"]
        for generation in running:
            until(generation, State.DECODE)
        waiting = engine.chat("one more", max_tokens=1, priority=Priority.LOW)
        for priority in (Priority.NORMAL, Priority.HIGH):
            assert answer(engine, f"now {priority}", max_tokens=3, priority=priority)[0]
        assert waiting.sequence.state is State.WAITING
        assert all(generation.sequence.state is State.DECODE for generation in running)
        running[0].cancel()
        assert list(waiting)[-1].reason == "length"
        running[1].cancel()


@pytest.mark.slow
def test_more_than_may_wait_are_refused_and_the_others_are_answered(folder: Path, phases: Phases):
    held = phases.hold(State.PREFILL)
    with Engine(str(folder / "qwen2"), max_queue=3) as engine:
        first = engine.chat("first", max_tokens=1)
        with held:
            waiting = [engine.chat("more", max_tokens=1) for _ in range(3)]
            with pytest.raises(EngineBusy, match="3 requests are waiting"):
                engine.chat("one too many")
            assert engine.stats().waiting == 3
            waiting[0].cancel()
        for generation in (first, *waiting[1:]):
            assert list(generation)[-1].reason == "length"
        assert answer(engine, "again")[0]


@pytest.mark.slow
def test_less_important_requests_leave_places_to_others(folder: Path, phases: Phases):
    held = phases.hold(State.PREFILL)
    with Engine(str(folder / "qwen2"), max_queue=2) as engine:
        begun = [engine.chat("first", max_tokens=1)]
        with held:
            for priority in (Priority.LOW, Priority.NORMAL):
                begun.append(engine.chat("more", max_tokens=1, priority=priority))
                with pytest.raises(EngineBusy):
                    engine.chat("one too many", priority=priority)
            begun.append(engine.chat("in haste", max_tokens=1, priority=Priority.HIGH))
        for generation in begun:
            assert list(generation)[-1].reason == "length"


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_the_state_of_a_conversation_is_measured_right(engine: Engine):
    _, generation = answer(engine, "word " * 700, max_tokens=2)
    line = max(engine.pool.prefixes.entries(), key=lambda line: len(line.tokens))
    held = sum(layer.nbytes for layer in line.cache)
    expected = runtime(engine).state_size.nbytes(len(line.tokens))
    assert 0.8 * held < expected < 1.3 * held  # layers grow in steps


@pytest.mark.slow
def test_requests_that_do_not_fit_together_take_turns(folder: Path):
    with Engine(str(folder / "qwen2")) as engine:
        expected = [answer(engine, f"number {n} " * 100)[0] for n in range(3)]
        size, state = runtime(engine).size, runtime(engine).state_size
        tokens = engine.count_tokens(Request(engine.default.name, [user("number 0 " * 100)]))
    with Engine(str(folder / "qwen2"), memory=size + 2 * state.nbytes(tokens + 10, 16)) as engine:
        answer(engine, "loads the model")
        generations = [engine.chat(f"number {n} " * 100, max_tokens=16) for n in range(3)]
        most = 0
        for generation in generations:
            while not isinstance(next(generation), Done):
                most = max(most, engine.stats().running)
        assert most == 2
        assert [generation.sequence.visible for generation in generations] == expected
        assert engine.pool.prefixes.nbytes <= engine.pool.memory - size


@pytest.mark.slow
def test_a_conversation_that_fills_memory_goes_on_from_its_own_state(folder: Path):
    messages = [SYSTEM, user("long " * 200)]
    with Engine(str(folder / "qwen2")) as engine:
        tokens = engine.count_tokens(Request(engine.default.name, messages))
        answer(engine, "loads the model")
        size, state = runtime(engine).size, runtime(engine).state_size
    with Engine(
        str(folder / "qwen2"), memory=size + state.nbytes(tokens * 3 // 2), cache_limit=10**9
    ) as engine:
        answer(engine, [SYSTEM, user("another one")])
        said, _ = answer(engine, messages)
        messages += [{"role": "assistant", "content": said}, user("go on")]
        said, generation = answer(engine, messages)
        assert generation.usage.cached_tokens > 0.9 * tokens
        assert engine.pool.prefixes.nbytes <= engine.pool.memory - size
        assert said == cold(engine, messages)


@pytest.mark.slow
def test_a_conversation_larger_than_memory_is_refused_with_what_would_fit(folder: Path):
    with Engine(str(folder / "qwen2")) as engine:
        answer(engine, "measure")
        size, state = runtime(engine).size, runtime(engine).state_size
    with Engine(str(folder / "qwen2"), memory=size + state.nbytes(300)) as engine:
        with pytest.raises(PromptTooLong, match=r"\d+ tokens > 300 maximum"):
            list(engine.chat("word " * 400))
        # Known before it is queued, from now on
        with pytest.raises(PromptTooLong, match=r"\d+ tokens > 300 maximum"):
            engine.chat("word " * 400)
        endings = [list(engine.chat(f"short {n}", max_tokens=30000))[-1] for n in range(8)]
        sizes = {
            done.usage.prompt_tokens + done.usage.completion_tokens
            for done in endings
            if done.reason == "context"
        }
        assert sizes == {300}


@pytest.mark.slow
def test_answers_that_outgrow_memory_wait_for_each_other_and_stay_right(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    phases: Phases,
):
    caplog.set_level("INFO")
    monkeypatch.setattr(ModelRunner, "EXPECTED", 8)
    monkeypatch.setattr(StateSize, "STEP", 1)  # or memory would be full before
    with Engine(str(folder / "qwen2")) as engine:
        runs = [(f"number {n}", Sampling(temperature=float(n % 2), seed=n)) for n in range(20)]
        answers = {
            prompt: answer(engine, prompt, max_tokens=150, sampling=dice) for prompt, dice in runs
        }
        runs = [run for run in runs if answers[run[0]][1].usage.completion_tokens == 150][:4]
        size, state = runtime(engine).size, runtime(engine).state_size
    with Engine(str(folder / "qwen2"), memory=size + state.nbytes(400)) as engine:
        answer(engine, "loads the model")
        held = phases.hold(State.PREFILL)
        generations = [engine.chat(prompt, max_tokens=150, sampling=dice) for prompt, dice in runs]
        with held:
            assert engine.stats().waiting == 3
        assert [text(generation) for generation in generations] == [
            answers[prompt][0] for prompt, _ in runs
        ]
    assert "one waits after" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("phase", [State.PREFILL, State.DECODE])
def test_an_important_request_does_not_wait_for_memory_that_others_use(
    folder: Path, phase: State, monkeypatch: pytest.MonkeyPatch, phases: Phases
):
    monkeypatch.setattr(PromptReader, "CHUNK", 32)
    held = phases.hold(State.DECODE)
    with Engine(str(folder / "qwen2")) as engine:
        low = engine.chat("low " * 100, max_tokens=100, priority=Priority.LOW)
        with held:
            size, reserve = runtime(engine).size, runtime(engine).reserve(low.sequence)
        list(low)
        expected = low.sequence.visible
    with Engine(str(folder / "qwen2"), memory=size + reserve) as engine:
        answer(engine, "loads the model", max_tokens=1)
        held = phases.hold(phase)
        low = engine.chat("low " * 100, max_tokens=100, priority=Priority.LOW)
        with held:
            high = engine.chat("now", max_tokens=2, priority=Priority.HIGH)
        assert text(high)
        list(low)
        assert low.sequence.visible == expected
        assert low.usage.cached_tokens < 10
        assert phases.when(high, State.ENDED) < phases.when(low, State.ENDED)


@pytest.mark.slow
def test_idle_models_make_room_the_least_recently_used_first(folder: Path):
    import gc

    import mlx.core as mx

    gc.collect()
    with Engine(models_dirs=[folder]) as engine:

        def use(name: str) -> None:
            list(engine.submit(Request(name, [user("hi")], max_tokens=1)))

        empty = mx.get_active_memory()
        sizes = {}
        for name in ("qwen2", "qwen3"):
            before = mx.get_active_memory()
            use(name)
            sizes[name] = mx.get_active_memory() - before
            assert sizes[name] >= engine.pool.runners[name].size
        use("qwen2")
        engine.pool.memory = sum(runtime.size for runtime in engine.pool.runners.values())
        use("llama_sliding")
        assert {loaded.model.name for loaded in engine.loaded()} == {"qwen2", "llama_sliding"}
        for name in ("qwen2", "llama_sliding"):
            engine.unload(name)
        assert mx.get_active_memory() - empty < min(sizes.values()) / 10


@pytest.mark.slow
def test_less_important_requests_do_not_unload_what_others_have_used_lately(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with Engine(models_dirs=[folder], max_loaded=2) as engine:

        def use(name: str, priority: Priority) -> set[str]:
            list(engine.submit(Request(name, [user("hi")], max_tokens=1, priority=priority)))
            return {loaded.model.name for loaded in engine.loaded()}

        use("qwen2", Priority.HIGH)
        use("qwen3", Priority.LOW)
        assert use("llama_sliding", Priority.LOW) == {"qwen2", "llama_sliding"}
        use("qwen3", Priority.NORMAL)
        with pytest.raises(EngineBusy, match="more important"):
            use("llama_sliding", Priority.LOW)
        assert use("llama_sliding", Priority.NORMAL) == {"qwen2", "llama_sliding"}
        monkeypatch.setattr(ModelPool, "KEPT", 0.0)
        assert use("qwen3", Priority.LOW) == {"llama_sliding", "qwen3"}


@pytest.mark.slow
def test_weights_are_wired_and_nothing_else_is(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import mlx.core as mx

    wired: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)  # what a Mac's GPU would be told
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit: None)
    with Engine(models_dirs=[folder]) as engine:
        for name in ("qwen2", "qwen3"):
            list(engine.submit(Request(name, [user("hi")], max_tokens=1)))
        sizes = {name: loaded.size for name, loaded in engine.pool.runners.items()}
        # There was room for what was being loaded
        assert wired[-1] == sum(sizes.values()) <= wired[-2]
        engine.unload("qwen2")
        assert wired[-1] == sizes["qwen3"]
    assert wired[-1] == 0


def test_a_model_larger_than_memory_is_refused(folder: Path):
    refused = pytest.raises(ModelLoadError, match="needs .* of memory")
    with Engine(models_dirs=[folder], memory=1000) as engine, refused:
        list(engine.submit(Request("qwen2", [user("hi")])))
