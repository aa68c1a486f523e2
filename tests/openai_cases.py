"""What the tests of OpenAI's dialect share: tools, requests, the events of an answer."""

from __future__ import annotations

import json

from wire_cases import HI, Accepted

from _mlx_server.wire.openai import OpenAIChat
from _mlx_server.wire.responses import OpenAIResponses
from engine import Done, Request, Text, Thinking, ToolEnd, ToolInput, ToolStart, Usage

BASH = {
    "type": "function",
    "function": {
        "name": "Bash",
        "description": "Runs a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}
READ = {"type": "function", "function": {"name": "Read"}}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def flat(tool: dict) -> dict:
    """A tool as responses have it."""
    return {"type": "function", "strict": False, **tool["function"]}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat(**fields) -> Request:
    return OpenAIChat({"model": "m", "messages": HI, **fields}).request


def respond(**fields) -> Request:
    return OpenAIResponses({"model": "m", "input": "hi", **fields}).request


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": id, "type": "function", "function": {"name": name, "arguments": '{"x": 1}'}}
        for id, name in (("1", "f"), ("2", "g"))
    ],
}
EVENTS = [
    Thinking("h"),
    Thinking("m"),
    Text("Hel"),
    Text("lo"),
    ToolStart("toolu_1", "f"),
    ToolInput('{"x":'),
    ToolInput(" 1}"),
    ToolEnd({"x": 1}),
    ToolStart("toolu_2", "ns__g"),
    ToolInput("{}"),
    ToolEnd({}),
    Done(
        "tool_calls",
        Usage(prompt_tokens=100, cached_tokens=60, completion_tokens=20, thinking_tokens=7),
    ),
]


def answer(reply, *events) -> tuple[list, dict]:
    objects = json.loads(json.dumps(reply.open(Accepted())))
    for event in events:
        objects += json.loads(json.dumps(reply.event(event)))
    return objects, reply.whole()


NAMESPACE = {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "g"}]}
