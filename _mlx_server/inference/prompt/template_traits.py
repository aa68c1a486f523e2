"""What a chat template can render."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.constrained.schema import EMPTY_SCHEMA
from _mlx_server.inference.protocol import Message

Apply = Callable[[list[Message], list[dict[str, Any]] | None], str]
"""Renders messages and tools with the generation prompt. Raises whatever the template raises."""


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template can render. False means that it raises, or leaves something out."""

    has_system: bool  # a system message
    has_tools: bool  # tool definitions, calls and results
    user_after_tool: bool  # a user message right behind a tool's result
    assistant_first: bool  # an assistant message at the beginning
    parallel_calls: bool  # several calls in one message
    text_beside_thinking: bool  # text and thinking in one message with calls
    short_ids: bool  # this one demands that call ids have nine characters
    reasoning_field: str  # the message's field that it takes the thinking from


def find_traits(apply: Apply, source: str) -> TemplateTraits:
    """Finds a template's traits by rendering small conversations. The model's name tells nothing,
    since templates of one family differ between conversions. `source` is the template's text."""
    ask = {"role": "user", "content": "hello"}
    call = {"role": "assistant", "content": "", "tool_calls": [_call("call00001")]}
    result = {"role": "tool", "tool_call_id": "call00001", "name": "probe", "content": "4711"}
    pair = {**call, "tool_calls": [_call("call00001"), _call("call00002", "1516")]}
    results = [result, {**result, "tool_call_id": "call00002"}]
    long_id = "toolu_0123456789abcdefghijkl"
    long_call = {**call, "tool_calls": [_call(long_id)]}
    function = {"name": "probe_tool", "description": "x", "parameters": EMPTY_SCHEMA}
    tools = [{"type": "function", "function": function}]

    def shows(expected: str, *messages: Message, tools: list[dict[str, Any]] | None = None) -> bool:
        try:
            text = apply(list(messages), tools)
        except Exception:  # templates raise whatever their author liked
            return False
        return all(word in text for word in expected.split())

    has_tools = shows("probe_tool", ask, tools=tools)
    has_tools = has_tools and shows("0815 4711", ask, call, result, tools=tools)
    field = _reasoning_field(source)
    spoken_call = {**call, "content": "1", field: "2"}
    long_result = {**result, "tool_call_id": long_id}
    return TemplateTraits(
        has_system=shows("4711", {"role": "system", "content": "be brief 4711"}, ask),
        has_tools=has_tools,
        user_after_tool=shows("4711", ask, call, result, ask, tools=tools),
        assistant_first=shows("4711", {"role": "assistant", "content": "4711"}, ask),
        parallel_calls=shows("0815 1516 4711", ask, pair, *results, tools=tools),
        text_beside_thinking=shows("0815", ask, spoken_call, result, tools=tools),
        short_ids=has_tools and not shows("4711", ask, long_call, long_result, tools=tools),
        reasoning_field=field,
    )


def _reasoning_field(source: str) -> str:
    if "reasoning_content" in source:
        return "reasoning_content"
    uses_thinking = re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", source)
    return "thinking" if uses_thinking else "reasoning_content"


def _call(call_id: str, number: str = "0815") -> dict[str, Any]:
    function = {"name": "probe_tool", "arguments": {"number": number}}
    return {"id": call_id, "type": "function", "function": function}
