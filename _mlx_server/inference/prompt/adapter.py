"""Adapts a canonical conversation to a chat template that cannot render all of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

from _mlx_server.inference.prompt.template_traits import TemplateTraits
from _mlx_server.inference.protocol import Message

_TOOL_PROMPT = """You can call these tools:
{tools}
To call one, write only this, once per call:
<tool_call>
{{"name": "the tool's name", "arguments": {{...}}}}
</tool_call>"""


def adapt(
    messages: list[Message], tools: list[dict[str, Any]], traits: TemplateTraits
) -> list[Message]:
    """The conversation in a form that a template with these traits renders in full. Messages are
    copied where they change."""
    if not traits.has_tools:
        messages = _tools_as_text(messages, tools)
    if not traits.has_system:
        messages = _system_as_user(messages)
    if not traits.assistant_first:
        messages = _user_first(messages)
    if not traits.user_after_tool:
        messages = _join_to_results(messages)
    if traits.reasoning_field != "reasoning_content":
        messages = [_with_reasoning_field(message, traits) for message in messages]
    if not traits.parallel_calls:
        messages = _one_call_a_turn(messages)
    if traits.short_ids:
        messages = list(map(_with_short_ids, messages))
    return messages


def _tools_as_text(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Tool definitions in the system message, calls and results as text in the Hermes form."""
    out: list[Message] = []
    if tools:
        definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        content = _TOOL_PROMPT.format(tools=definitions)
        if messages and messages[0]["role"] == "system":
            content = f"{messages[0]['content']}\n\n{content}"
            messages = messages[1:]
        out.append({"role": "system", "content": content})
    for message in map(_as_text, messages):
        if out and message["role"] == "user" == out[-1]["role"]:
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n{message['content']}"}
        else:
            out.append(message)
    return out


def _as_text(message: Message) -> Message:
    """A message whose calls or result are text."""
    content = message["content"]
    if message["role"] == "tool":
        content = f"<tool_response>\n{content}\n</tool_response>"
        return {"role": "user", "content": content}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    parts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join([content, *parts] if content else parts)}


def _system_as_user(messages: list[Message]) -> list[Message]:
    """The system message at the beginning of the user's first."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    content = f"{system['content']}\n\n{rest[0]['content']}"
    return [{**rest[0], "content": content}, *rest[1:]]


def _user_first(messages: list[Message]) -> list[Message]:
    """A user message in front of an assistant's at the beginning."""
    at = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) <= at or messages[at]["role"] != "assistant":
        return messages
    return [*messages[:at], {"role": "user", "content": "(continued)"}, *messages[at:]]


def _join_to_results(messages: list[Message]) -> list[Message]:
    """What the user says behind a tool's result at the end of that result."""
    out: list[Message] = []
    for message in messages:
        if message["role"] == "user" and out and out[-1]["role"] == "tool":
            content = f"{out[-1]['content']}\n\n{message['content']}"
            out[-1] = {**out[-1], "content": content}
        else:
            out.append(message)
    return out


def _with_reasoning_field(message: Message, traits: TemplateTraits) -> Message:
    """The thinking in the template's own field, and text beside thinking and calls in it where the
    template does not take all three."""
    thinking, content = message.get("reasoning_content"), message["content"]
    if not thinking:
        return message
    if content and message.get("tool_calls") and not traits.text_beside_thinking:
        thinking, content = f"{thinking}\n\n{content}", ""
    return {**message, traits.reasoning_field: thinking, "content": content}


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Parallel calls as turns of one call, each followed by its result."""
    out: list[Message] = []
    placed: set[str] = set()  # ids of results that stand behind their call
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            if message["role"] != "tool" or message.get("tool_call_id") not in placed:
                out.append(message)
            continue
        behind = itertools.takewhile(lambda one: one["role"] == "tool", messages[at + 1 :])
        results = {result.get("tool_call_id", ""): result for result in behind}
        turn = message
        for call in calls:
            out.append({**turn, "tool_calls": [call]})
            if call.get("id") in results:
                out.append(results[call["id"]])
            turn = {"role": "assistant", "content": ""}
        placed |= results.keys()
    return out


def _with_short_ids(message: Message) -> Message:
    """Call ids as hashes of nine characters, so that a call and its result still agree."""

    def short(call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    if message.get("tool_calls"):
        calls = [{**call, "id": short(call.get("id", ""))} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}
    if message["role"] == "tool":
        return {**message, "tool_call_id": short(message.get("tool_call_id", ""))}
    return message
