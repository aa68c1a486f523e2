"""What fails for one request: what the others are told, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import kinds
from phases import Phases
from test_concurrent import begin, runtime
from test_engine import answer

from _mlx_server.inference.sequence import State
from engine import Engine, EngineError, Generation


@pytest.fixture(scope="module", params=kinds("qwen2"))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(str(folder / request.param)) as engine:
        yield engine


def replace_sampler(engine: Engine, generation: Generation, sampler: Any) -> None:
    """Gives a request that decodes another sampler."""
    group, at = runtime(engine).decode_batch.find(generation.sequence.number)
    group.samplers[at] = generation.sequence.sampler = sampler


def beside_a_failure(victim: Generation, guests: list[Generation]) -> list[str]:
    """What guests are told while a request that decodes with them fails."""
    with pytest.raises(EngineError, match="try again"):
        list(victim)
    for guest in guests:
        list(guest)
    return [guest.sequence.visible for guest in guests]


@pytest.mark.slow
def test_a_step_that_fails_for_one_request_fails_no_other(engine: Engine, phases: Phases):
    expected = [answer(engine, f"number {n}", max_tokens=60)[0] for n in range(3)]

    def bad(logprobs: Any) -> Any:
        raise RuntimeError("a sampler that fails")

    engine.unload(engine.default.name)
    held = phases.hold(State.DECODE, 4)
    guests = [engine.chat(f"number {n}", max_tokens=60) for n in range(3)]
    victim = engine.chat("victim", max_tokens=4000)
    with held:
        assert all(one.sequence.state is State.DECODE for one in (*guests, victim))
        replace_sampler(engine, victim, bad)
    assert beside_a_failure(victim, guests) == expected
    assert answer(engine, "number 0", max_tokens=60)[0] == expected[0]


def failing(logprobs: Any) -> Any:
    """A sampler whose token cannot be computed, which shows when somebody waits for it."""
    import mlx.core as mx

    wrong = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu).sum()
    return mx.argmax(logprobs, axis=-1) + wrong.astype(mx.uint32)


@pytest.mark.slow
def test_a_step_that_fails_while_it_is_computed_is_not_blamed_on_what_comes_next(
    folder: Path, phases: Phases
):
    with Engine(str(folder / "qwen2")) as engine:
        expected = [answer(engine, f"number {n}", max_tokens=60)[0] for n in range(2)]
        engine.unload(engine.default.name)
        held = phases.hold(State.DECODE, 2)
        guests = [engine.chat("number 0", max_tokens=60, logprobs=1)]
        victim = engine.chat("victim", max_tokens=4000)

        def bad(logprobs: Any) -> Any:
            if len(guests) == 1:
                # Its prompt is read while the step is computed
                guests.append(engine.chat("number 1", max_tokens=60))
            return failing(logprobs)

        with held:
            assert guests[0].sequence.state is victim.sequence.state is State.DECODE
            replace_sampler(engine, victim, bad)
        assert beside_a_failure(victim, guests) == expected


@pytest.mark.slow
def test_a_step_that_fails_while_one_is_to_wait_for_memory_fails_only_its_cause(
    folder: Path, phases: Phases
):
    with Engine(str(folder / "qwen2")) as engine:
        expected, _ = answer(engine, "guest", max_tokens=60)
        engine.unload(engine.default.name)
        held = phases.hold(State.DECODE, 2)
        guest = engine.chat("guest", max_tokens=60)
        victim = engine.chat("victim", max_tokens=4000)
        with held:
            assert guest.sequence.state is victim.sequence.state is State.DECODE
            replace_sampler(engine, victim, failing)
            reserve = runtime(engine).reserve(guest.sequence)  # there is room for it alone
            engine.pool.memory = runtime(engine).size + reserve
        assert beside_a_failure(victim, [guest]) == [expected]


@pytest.mark.slow
def test_a_state_that_a_failed_step_has_changed_is_not_kept(folder: Path):
    import mlx.core as mx

    with Engine(str(folder / "qwen2")) as engine:
        answer(engine, "loads the model")
        steps = 0

        def bad(logprobs: Any) -> Any:
            nonlocal steps
            steps += 1
            # Behind the last token
            wrong = (
                mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu).sum() if steps > 4 else mx.array(0)
            )
            return mx.array([300], mx.uint32) + wrong.astype(mx.uint32)

        one = engine.chat("one " * 100, max_tokens=4)
        one.sequence.sampler = bad
        list(one)  # all its tokens are there
        assert steps == 5 and len(engine.pool.prefixes.entries()) == 1


@pytest.mark.slow
def test_who_ends_while_the_step_for_others_fails_has_a_whole_answer(folder: Path, phases: Phases):
    import mlx.core as mx

    with Engine(str(folder / "qwen2")) as engine:
        whole, _ = answer(engine, "number 0", max_tokens=60)
        stop = whole[20:23]
        first = engine.chat("number 0", max_tokens=60, stop=[stop])
        list(first)
        last = first.usage.completion_tokens
        expected = [first.sequence.visible, answer(engine, "number 1", max_tokens=60)[0]]
        engine.unload(engine.default.name)
        held = phases.hold(State.DECODE, 3)
        guests = [
            engine.chat("number 0", max_tokens=60, stop=[stop]),
            engine.chat("number 1", max_tokens=60),
        ]
        victim = engine.chat("victim", max_tokens=4000)

        def bad(logprobs: Any) -> Any:
            fails = guests[0].usage.completion_tokens >= last - 1
            return failing(logprobs) if fails else mx.argmax(logprobs, axis=-1)

        with held:
            assert all(one.sequence.state is State.DECODE for one in (*guests, victim))
            replace_sampler(engine, victim, bad)
        assert beside_a_failure(victim, guests) == expected


def test_an_answer_that_cannot_be_decoded_fails_alone(engine: Engine, phases: Phases):
    class Broken:
        last_segment = ""

        def add_token(self, token: int) -> None:
            raise ValueError("a tokenizer that fails")

    expected, _ = answer(engine, "guest", max_tokens=40)
    held = phases.hold(State.DECODE, 2)
    guest, victim = engine.chat("guest", max_tokens=40), engine.chat("victim", max_tokens=4000)
    with held:
        assert guest.sequence.state is victim.sequence.state is State.DECODE
        victim.sequence.detokenizer = Broken()
    with pytest.raises(EngineError, match="try again"):
        list(victim)
    list(guest)
    assert guest.sequence.visible == expected
    assert answer(engine, "victim")[0]


def test_logits_that_are_no_numbers_fail_the_request_and_leave_no_trace(engine: Engine):
    import mlx.core as mx

    expected, _ = answer(engine, "poison", max_tokens=8)
    engine.unload(engine.default.name)
    answer(engine, "loads the model")
    model = runtime(engine).model
    runtime(engine).decode_batch.model = lambda *args, **kwargs: (
        model(*args, **kwargs) * mx.array(float("nan"))
    )
    with pytest.raises(EngineError, match="try again"):
        answer(engine, "poison", max_tokens=8)
    runtime(engine).decode_batch.model = model
    assert answer(engine, "poison", max_tokens=8)[0] == expected


@pytest.mark.slow
def test_a_failure_that_nobody_expected_costs_only_what_was_running(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    expected, _ = answer(engine, "after", max_tokens=8)
    victim = engine.chat("victim", max_tokens=4000)
    begin(victim)

    def fails(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyError("nobody expected this")

    monkeypatch.setattr(engine.pool, "rebalance", fails)
    with pytest.raises(EngineError, match="starts afresh"):
        list(victim)
    assert answer(engine, "after", max_tokens=8)[0] == expected
    assert engine.health() is None
