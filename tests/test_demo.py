"""The built-in model keeps its contract (tests/demo/README.md) on fresh prompts, through the
engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo.data import contract_prompts

from engine import Engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo") as engine:
        yield engine


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, count",
    [
        ("bare", 3),
        pytest.param("bare", 22, marks=SLOW),
        pytest.param("quiet", 22, marks=SLOW),
        pytest.param("chat", 22, marks=SLOW),
        pytest.param("long", 11, marks=SLOW),
        pytest.param("agent", 4, marks=SLOW),
        pytest.param("own", 22, marks=SLOW),
    ],
)
def test_fresh_prompts_are_answered_to_the_character(engine: Engine, shape: str, count: int):
    """`python tests/demo/data.py` asks 300 a shape; of these few at most one may be missed."""
    prompts = list(contract_prompts(4242, count, shape))
    thinking = False if shape == "quiet" else None
    answers = [
        engine.chat(p.messages, tools=p.tools or [], max_tokens=400, thinking=thinking)
        for p in prompts
    ]
    wrong = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for _ in answer:
            pass
        if answer.sequence.raw != prompt.expected:
            wrong.append((prompt.expected, answer.sequence.raw))
    assert len(wrong) <= 1, wrong
