"""A turn that the model ends inside its thinking says nothing: its answer is asked for, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import kinds

from engine import Done, Engine, Text, Thinking


@pytest.fixture(params=kinds("llama_sliding"))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(str(folder / request.param)) as engine:
        yield engine


def script(engine: Engine, monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[int]:
    """Makes every answer of the engine consist of these texts; returns their tokens."""
    import mlx.core as mx

    assert engine.default is not None
    encode = engine.renderer(engine.default).encode
    tokens = [token for text in texts for token in encode(text)]
    left = iter(tokens)

    def make(*_: object) -> Callable[[mx.array], mx.array]:
        return lambda logprobs: mx.array([next(left, tokens[-1])])

    monkeypatch.setattr("_mlx_server.inference.decoding.runner.make_sampler", make)
    return tokens


def told(events: list) -> tuple[str, str]:
    thoughts = "".join(event.text for event in events if isinstance(event, Thinking))
    return thoughts, "".join(event.text for event in events if isinstance(event, Text))


def test_the_answer_follows_thinking_that_was_not_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    # Each token is picked one step before it is told: the one behind the end is never used.
    script(engine, monkeypatch, "<think>", "hm", "<|im_end|>", "x", "Yes.", "<|im_end|>")
    generation = engine.chat("hi", max_tokens=50)
    *events, done = list(generation)
    assert told([*events, done]) == ("hm", "Yes.")
    assert isinstance(done, Done) and done.reason == "stop"
    again = engine.chat(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "go on"},
        ],
        max_tokens=0,
    )
    list(again)
    assert again.usage.cached_tokens >= len(done.tokens) - 1


def test_it_is_asked_for_once_and_within_the_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    script(engine, monkeypatch, "<think>", "hm", "<|im_end|>", "x", "<|im_end|>", "x")
    *events, done = list(engine.chat("hi", max_tokens=50))
    assert told(events) == ("hm", "") and done.reason == "stop"
    script(engine, monkeypatch, "<think>", "hm", "hm", "hm")
    *events, done = list(engine.chat("ho", max_tokens=3))
    assert told(events)[1] == "" and done.reason == "length"
