"""What flags say of the requests to some models, or in some dialects."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
from test_http import ask

from _mlx_server.front.options import ThinkingDefault, thinking_rule
from _mlx_server.front.rules import apply_thinking, first_match
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.ollama import OllamaChat
from _mlx_server.wire.openai import OpenAIChat
from _mlx_server.wire.reply import Reply
from engine import Engine

ON, OFF, FEW = (thinking_rule(text)[1] for text in ("on", "off", "2000"))


def messages(**fields: object) -> Reply:
    asked = {"role": "user", "content": "hi"}
    body = {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [asked], **fields}
    return AnthropicMessages(body)


def chat(**fields: object) -> Reply:
    asked = {"role": "user", "content": "hi"}
    return OllamaChat({"model": "m", "messages": [asked], **fields})


def completion(**fields: object) -> Reply:
    asked = {"role": "user", "content": "hi"}
    return OpenAIChat({"model": "m", "messages": [asked], **fields})


@pytest.mark.parametrize(
    "reply, default, thinking, budget",
    [
        # Nothing is said
        (messages(), OFF, False, None),
        (messages(), ON, True, None),
        (chat(), FEW, True, 2000),
        # Claude Code leaves it to this side
        (messages(thinking={"type": "adaptive"}), OFF, False, None),
        (messages(thinking={"type": "adaptive"}), FEW, True, 2000),
        # An effort makes it less, not more
        (messages(thinking={"type": "adaptive"}, output_config={"effort": "low"}), FEW, True, 1024),
        (messages(thinking={"type": "adaptive"}, output_config={"effort": "max"}), FEW, True, 2000),
        (completion(reasoning_effort="high"), FEW, True, 2000),
        # The request says it
        (messages(thinking={"type": "disabled"}), FEW, False, None),
        (messages(thinking={"type": "enabled", "budget_tokens": 9000}), FEW, True, 9000),
        (messages(thinking={"type": "enabled", "budget_tokens": 9000}), OFF, True, 9000),
        (chat(think=True), OFF, True, None),
        (chat(think=False), ON, False, None),
        (completion(reasoning_effort="none"), ON, False, None),
    ],
)
def test_the_default_counts_below_what_a_request_says(
    reply: Reply, default: ThinkingDefault, thinking: bool, budget: int | None
):
    for _ in range(2):  # a request of several answers is the same one
        apply_thinking(reply.request, default)
        assert (reply.request.thinking, reply.request.thinking_budget) == (thinking, budget)


def test_the_first_rule_that_matches_a_name_or_a_dialect_counts():
    rules = [thinking_rule(text) for text in ("claude-*=2k", "qwen*=off", "ollama=1", "on")]
    assert first_match(rules, messages(), "demo") == ThinkingDefault(True, 2048)
    assert first_match(rules, chat(), "Qwen3-8B") == ThinkingDefault(False)
    assert first_match(rules, chat(), "demo") == ThinkingDefault(True, 1)
    assert first_match(rules, completion(), "demo") == ThinkingDefault(True)
    assert first_match(rules[:3], completion(), "demo") is None


@pytest.mark.parametrize("text", ["", "maybe", "=on", "claude-*=", "0", "-5"])
def test_a_rule_of_another_form_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        thinking_rule(text)


@pytest.mark.slow
def test_the_default_holds_in_every_api(serve: Callable):
    said = {"role": "user", "content": "think then say all is well"}
    with Engine("demo") as engine:
        for path in ("/v1/messages", "/v1/chat/completions", "/api/chat"):
            body = {"model": "demo", "max_tokens": 60, "stream": False, "messages": [said]}
            answers = [
                ask(serve(engine, thinking=[("*", default)]), "POST", path, body)[1]
                for default in (ON, OFF)
            ]
            assert [b"wants me to think" in text for text in answers] == [True, False], path
