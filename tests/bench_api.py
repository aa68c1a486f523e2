"""The three APIs that a server can be measured in: a Messages API body as a request of each, and
what each sends back as an `Answer`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What a request cost, and the content blocks it brought, in the Messages API's form.

    prompt, tokens: tokens of the prompt and of the answer.
    reused: tokens of the prompt that the server had read before; None if it does not tell.
    first: seconds to the first piece of the answer; rest: seconds from there to the last one.
    reading: seconds that the server says it read the prompt for; 0 if it does not.
    """

    prompt: int = 0
    reused: int | None = None
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    reading: float = 0.0
    content: list[dict] = field(default_factory=list)


def blocks(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_event(event: dict, answer: Answer) -> bool:
    """Adds an event of the Messages API; whether it brought a piece of the answer."""
    usage = event.get("message", event).get("usage") or {}
    if "input_tokens" in usage:
        answer.reused = usage.get("cache_read_input_tokens") or 0
        created = usage.get("cache_creation_input_tokens") or 0
        answer.prompt = usage["input_tokens"] + answer.reused + created
    answer.tokens = usage.get("output_tokens", answer.tokens)
    if event["type"] == "content_block_start":
        block = event["content_block"]
        answer.content.append({**block, "json": ""} if block["type"] == "tool_use" else {**block})
    elif event["type"] == "content_block_delta":
        block, delta = answer.content[-1], event["delta"]
        for kind in ("text", "thinking", "signature"):
            if kind in delta:
                block[kind] = block.get(kind, "") + delta[kind]
        if "partial_json" in delta:
            block["json"] += delta["partial_json"]
    return event["type"] == "content_block_delta"


def read_chunk(chunk: dict, answer: Answer) -> bool:
    """The same for a chunk of a chat completion."""
    if usage := chunk.get("usage"):
        answer.prompt, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
    if text := delta.get("content"):
        if not answer.content or answer.content[-1]["type"] != "text":
            answer.content.append({"type": "text", "text": ""})
        answer.content[-1]["text"] += text
    for call in delta.get("tool_calls") or []:
        function = call["function"]
        if call.get("id"):
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "json": ""}
            answer.content.append(block)
        answer.content[-1]["json"] += function.get("arguments") or ""
    kinds = ("content", "tool_calls", "reasoning_content", "reasoning")
    return any(delta.get(kind) for kind in kinds)


def read_object(event: dict, answer: Answer) -> bool:
    """The same for a line of Ollama's API. Its prompt counts hold what had been read before."""
    if event.get("done"):
        answer.prompt, answer.tokens = event.get("prompt_eval_count", 0), event.get("eval_count", 0)
        answer.reading = event.get("prompt_eval_duration", 0) / 1e9
    message, calls = event.get("message") or {}, []
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = json.dumps(function["arguments"])
        calls.append(
            {
                **call,
                "id": f"call_{len(answer.content) + len(calls)}",
                "function": {**function, "arguments": arguments},
            }
        )
    delta = {
        "content": message.get("content"),
        "tool_calls": calls,
        "reasoning": message.get("thinking"),
    }
    return read_chunk({"choices": [{"delta": delta}]}, answer)


def as_chat(body: dict) -> dict:
    """A Messages API body as one of /v1/chat/completions."""
    keys = ("model", "max_tokens", "temperature", "stream")
    chat: dict[str, Any] = {key: body[key] for key in keys if key in body}
    chat["messages"] = []
    if system := "\n\n".join(block["text"] for block in blocks(body.get("system") or [])):
        chat["messages"].append({"role": "system", "content": system})
    for message in body["messages"]:
        chat["messages"] += chat_messages(message)
    chat["stream_options"] = {"include_usage": True}
    tools = [chat_tool(tool) for tool in body.get("tools") or [] if "input_schema" in tool]
    if tools:
        chat["tools"] = tools
    return chat


def chat_messages(message: dict) -> list[dict]:
    """A message of the Messages API as chat messages: the tool results first."""
    texts, calls, results = [], [], []
    for block in blocks(message["content"]):
        if block["type"] == "text":
            texts.append(block["text"])
        elif block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block["input"])}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif block["type"] == "tool_result":
            text = "\n".join(part.get("text", "") for part in blocks(block.get("content") or []))
            result = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}
            results.append(result)
    if not texts and not calls:
        return results
    said: dict[str, Any] = {
        "role": "user" if message["role"] == "system" else message["role"],
        "content": "\n\n".join(texts),
    }
    if calls:
        said["tool_calls"] = calls
    return [*results, said]


def chat_tool(tool: dict) -> dict:
    function = {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def as_ollama(body: dict) -> dict:
    """A Messages API body as one of /api/chat."""
    chat = as_chat(body)
    for message in chat["messages"]:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    options = {"num_predict": chat.pop("max_tokens"), "temperature": chat.pop("temperature")}
    return {**chat, "options": options}


APIS: dict[str, tuple[str, Callable[[dict], dict], Callable[[dict, Answer], bool]]] = {
    "ollama": ("/api/chat", as_ollama, read_object),
    "messages": ("/v1/messages", dict, read_event),
    "chat": ("/v1/chat/completions", as_chat, read_chunk),
}
"""Name: path, the body's form, and the reader of an answer's pieces."""
