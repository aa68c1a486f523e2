"""Thinking budgets: thinking is ended when its tokens are spent, and everything else stays as it
is."""

from __future__ import annotations

import json
from pathlib import Path

import anthropic
import mlx.core as mx
import pytest
from conftest import Server
from jsonschema import Draft202012Validator
from models import CHATML, build_model

from _mlx_server.inference.constrained.constraint import ThinkingBudget
from _mlx_server.inference.protocol import EFFORT_BUDGETS
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.fields import WireError
from engine import Engine, Generation, Sampling, Text, Thinking

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
OPENS = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n<think>\n{% endif %}{# enable_thinking #}",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("models")
    build_model("qwen3", folder / "thinker", template=OPENS)
    with Engine(str(folder / "thinker")) as engine:
        yield engine


def ask(engine: Engine, budget: int | None, **fields) -> Generation:
    return engine.chat(
        "hi",
        thinking_budget=budget,
        **{"max_tokens": 30, "sampling": Sampling(temperature=1.0, seed=3), **fields},
    )


def parts(generation: Generation) -> tuple[str, str, int]:
    """What was thought and what was said, and the number of tokens of the thinking, its end
    included."""
    events = list(generation)
    thought, said = (
        "".join(event.text for event in events if isinstance(event, kind))
        for kind in (Thinking, Text)
    )
    return thought, said, events[-1].usage.thinking_tokens


@pytest.mark.slow
def test_thinking_ends_when_its_tokens_are_spent_and_begins_as_it_would_have(engine: Engine):
    free, said, _ = parts(ask(engine, None))
    assert free and not said
    for budget in (0, 1, 7):
        thought, said, tokens = parts(ask(engine, budget))
        assert tokens == budget + 1 and said and free.startswith(thought.strip("\ufffd"))
    assert parts(ask(engine, 1000)) == parts(ask(engine, None))


@pytest.mark.slow
def test_an_effort_is_worth_a_budget_where_the_template_knows_no_efforts(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(EFFORT_BUDGETS, "low", 7)
    few, free = parts(ask(engine, 7)), parts(ask(engine, None))
    assert parts(ask(engine, None, effort="low")) == few != free
    assert parts(ask(engine, 3, effort="low")) == parts(ask(engine, 3))
    assert parts(ask(engine, None, effort="max")) == free
    template = OPENS + "{# reasoning_effort #}"
    build_model("qwen3", tmp_path / "knows", template=template)
    with Engine(str(tmp_path / "knows")) as knows:
        assert parts(ask(knows, None, effort="low")) == parts(ask(knows, None))


@pytest.mark.slow
def test_a_server_has_a_default_for_what_a_request_leaves_open(tmp_path: Path):
    build_model("qwen3", tmp_path / "thinker", template=OPENS)
    server = Server("--model", str(tmp_path / "thinker"), "--thinking", "anthropic=7")
    client = anthropic.Anthropic(base_url=server.url, api_key="any")

    def thought(**fields) -> int:
        message = client.messages.create(
            model="thinker",
            max_tokens=30,
            messages=[{"role": "user", "content": "hi"}],
            **fields,
        )
        return message.usage.output_tokens_details.thinking_tokens

    try:
        assert thought() == thought(thinking={"type": "adaptive"}) == 8
        assert thought(thinking={"type": "enabled", "budget_tokens": 12}) == 13
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_each_request_of_a_batch_has_a_budget_of_its_own(engine: Engine):
    budgets = [None, 0, 3, 9, None, 5]
    alone = [parts(ask(engine, budget)) for budget in budgets]
    together = [ask(engine, budget) for budget in budgets]
    assert [parts(generation) for generation in together] == alone


def test_a_format_is_kept_behind_thinking_that_was_ended(engine: Engine):
    pytest.importorskip("llguidance")
    for generation in [ask(engine, budget, format=SCHEMA, max_tokens=80) for budget in (0, 4, 9)]:
        _, said, _ = parts(generation)
        Draft202012Validator(SCHEMA).validate(json.loads(said))


@pytest.mark.slow
def test_a_model_that_has_learnt_to_think_answers_all_the_same():
    with Engine("demo") as engine:

        def answer(budget: int | None) -> tuple[str, str, int]:
            return parts(
                engine.chat("think then say hello", max_tokens=100, thinking_budget=budget)
            )

        free, cut = answer(None), answer(4)
        assert free[0].startswith(cut[0]) and len(cut[0]) < len(free[0]) and cut[1] and cut[2] <= 6
        assert answer(90) == free
        assert parts(engine.chat("say hello", max_tokens=20, thinking_budget=0))[1] == "hello"


def allowed(budget: ThinkingBudget, *context: int) -> list[int]:
    logits = budget(mx.array(context), mx.zeros((1, 9)))
    return [token for token, logit in enumerate(logits[0].tolist()) if logit == 0]


def test_markers_of_several_tokens_are_finished_and_calls_are_left_alone():
    every = list(range(9))
    budget = ThinkingBudget(2, 1, start=[1, 2], end=[3, 4], call=[8])
    assert [
        allowed(budget, 0, *answer)
        for answer in ([], [1], [1, 2], [1, 2, 5], [1, 2, 5, 6], [1, 2, 5, 3])
    ] == [every, every, every, every, [3], [4]]
    assert (
        allowed(budget, 0, 1, 2, 5, 3, 4)
        == allowed(budget, 0, 1, 2, 5, 3, 4, 1, 2, 5, 6, 7)
        == every
    )
    assert allowed(ThinkingBudget(2, 1, [], [3, 4], [8]), 0, 5, 8, 6) == every
    late = ThinkingBudget(2, 1, start=[1, 2], end=[3, 4], call=[8])
    assert (
        allowed(late, 0, 5, 5, 5, 5, 5) == allowed(late, 0, 5, 5, 5, 5, 5, 1, 2, 5, 5, 5) == every
    )


@pytest.mark.parametrize(
    "thinking, budget",
    [
        ({"type": "enabled", "budget_tokens": 50}, 50),
        ({"type": "enabled"}, None),
        ({"type": "enabled", "budget_tokens": None}, None),
        ({"type": "adaptive", "budget_tokens": 50}, None),
        ({"type": "disabled"}, None),
        (None, None),
    ],
)
def test_anthropics_budget_tokens(thinking: dict | None, budget: int | None):
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": thinking,
    }
    assert AnthropicMessages(body).request.thinking_budget == budget


@pytest.mark.parametrize("budget", ["50", -1, True, 1.5])
def test_a_budget_is_a_number_of_tokens(budget: object):
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": "enabled", "budget_tokens": budget},
    }
    with pytest.raises(WireError, match="thinking.budget_tokens: Input should be"):
        AnthropicMessages(body)
