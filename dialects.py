"""The interpreters: vendors' JSON on one side, the engine's `Request` and `Event`s on the other.

Plain functions and small classes from dict to dict. They know no socket and no MLX array, so every rule of a wire is
testable without a server. Four districts: what all dialects share, above all the one way into the canonical
conversation; then Anthropic; then Ollama; then OpenAI.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import logging
import math
import re
import struct
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Callable, Iterable

from engine import (
    Done, Embedding, EngineBusy, EngineClosed, EngineError, Event, InvalidRequest, Loaded, LocalModel, Message, ModelLoadError,
    ModelNotFound, Preset, PromptTooLong, Request, Sampling, Text, Thinking, Token, ToolEnd, ToolInput, ToolStart, Usage,
)

log = logging.getLogger("mlx_server")

Object = dict[str, Any]
"""A JSON object of some wire."""

IMAGE_NOTE = "[image omitted: this model cannot see images]"
NO_RESULT = "[no result: interrupted]"


# ================================================================== shared


class WireError(Exception):
    """A request that its wire does not allow: HTTP status, a sentence for the client and headers to send with it."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class Reply:
    """One request's answer in one dialect. One instance per HTTP request, made from the request's body.

    `dialect` is its name, `stream` says what the client asked for, `framing` how objects are framed then: "events"
    (server-sent events, named by the object's "type"), "data" (the same without names) or "lines" (NDJSON); what is text
    already goes out as a frame of its own. With `unload` set the model is to be unloaded, not asked, and `whole` is the
    answer. Streaming or not, every event of the generations goes through `event`.
    """

    request: Request
    dialect: str
    stream: bool
    framing: str
    unload = False

    @property
    def requests(self) -> list[Request]:
        """What is to be generated. The events of one follow those of the other in this order."""
        return [self.request]

    def check(self, model: LocalModel) -> None:
        """Called with the resolved model before anything is queued. Raises WireError if the model cannot do this."""

    def open(self, generation: Any) -> list[Object]:
        """Objects to send at once when the engine has accepted the request."""
        return []

    def event(self, event: Event) -> list[Object | str]:
        """Objects for one event; for `Done` the closing ones."""
        raise NotImplementedError

    def ping(self, lull: float = 0.0) -> list[Object | str]:
        """Objects that mean nothing but that the server is alive, when for `lull` seconds nothing else was to be said."""
        return []

    def failure(self, error: Exception) -> list[Object]:
        """Objects that end a stream whose generation failed."""
        raise NotImplementedError

    def whole(self) -> Object:
        """The body of an answer that is not streamed."""
        raise NotImplementedError


class Embeddings(Reply):
    """The vectors of some texts, or token ids, one request for each; with none of them the model is only loaded. `dimensions`
    is how many numbers of a vector are kept."""

    stream = False

    def __init__(self, name: str, texts: list[str] | list[list[int]], *, truncate: bool, dimensions: int | None = None,
                 keep_alive: float | None = None):
        if not all(texts):
            raise WireError(400, "input: an empty text has no embedding")
        self.request = Request(name, keep_alive=keep_alive)
        self._requests = [Request(name, prompt=text, embed=True, truncate=truncate, max_tokens=0) for text in texts]
        self._requests[-1:] = [replace(one, keep_alive=keep_alive) for one in self._requests[-1:]] or [self.request]
        self.vectors: list[list[float]] = []
        self.usages: list[Usage] = []
        self._dimensions = dimensions

    def event(self, event: Event) -> list[Object | str]:
        match event:
            case Embedding(vector):
                self.vectors.append(vector)
            case Done():
                self.usages.append(event.usage)
        return []

    @property
    def requests(self) -> list[Request]:
        return self._requests

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(usage.prompt_tokens for usage in self.usages)

    def unit_vectors(self) -> list[list[float]]:
        """The vectors, cut and then of length 1."""
        cut = [vector[:self._dimensions] for vector in self.vectors]
        return [[number / (math.hypot(*vector) or 1.0) for number in vector] for vector in cut]


# ------------------------------------------------------------------ checking

_KINDS = {str: "a valid string", bool: "a valid boolean", int: "a valid integer", float: "a valid number",
          list: "a valid list", dict: "an object"}


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind: a boolean is no number, an integer is a `float` too, NaN is nothing."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return is_a(value, int) or isinstance(value, float) and math.isfinite(value)
    return isinstance(value, kind)


def take(body: Object, key: str, kind: type, path: str = "", *, required: bool = False, default: Any = None,
         low: float | None = None, high: float | None = None) -> Any:
    """`body[key]`, checked. Null is absent. `path` ("messages.0.") precedes the key in the sentence of a WireError."""
    value = body.get(key)
    if value is None:
        if required:
            raise WireError(400, f"{path}{key}: Field required")
        return default
    if not is_a(value, kind):
        raise WireError(400, f"{path}{key}: Input should be {_KINDS[kind]}")
    if low is not None and value < low:
        raise WireError(400, f"{path}{key}: Input should be greater than or equal to {low}")
    if high is not None and value > high:
        raise WireError(400, f"{path}{key}: Input should be less than or equal to {high}")
    return value


def items(body: Object, key: str, kind: type, path: str = "", *, required: bool = False) -> list:
    """The list `body[key]` with all its items checked to be of `kind`."""
    values = take(body, key, list, path, required=required, default=[])
    for number, value in enumerate(values):
        if not is_a(value, kind):
            raise WireError(400, f"{path}{key}.{number}: Input should be {_KINDS[kind]}")
    return values


def model_name(body: Any) -> str:
    """The model that a body asks for. Raises WireError if it names none."""
    if not isinstance(body, dict):
        raise WireError(400, "Input should be an object")
    name = take(body, "model", str, required=True)
    if not name:
        raise WireError(400, "model: String should have at least 1 character")
    return name


def content_blocks(content: Any, path: str) -> list[Object]:
    """Content as blocks; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise WireError(400, f"{path}: Input should be a valid string or list")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise WireError(400, f"{path}.{number}: Input should be an object")
    return content


def tool_form(name: str, description: str, schema: Object) -> Object:
    """A tool in the form chat templates know. The schema always says `object` and has properties."""
    schema = {**schema, "type": "object"} if "type" in schema else {"type": "object", **schema}
    if not isinstance(schema.get("properties"), dict):
        schema["properties"] = {}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def function_tools(tools: list[Object]) -> list[Object]:
    """The tools of a body, which are written as OpenAI's chat and Ollama do it or, flat, as OpenAI's responses do. Those of
    other types are left out. Raises WireError when nothing is left then."""
    functions, others = [], []
    for number, tool in enumerate(tools):
        at = f"tools.{number}."
        kind = take(tool, "type", str, at, default="function")
        if kind != "function" and "function" not in tool:
            others.append(kind)
            continue
        function, at = nested(tool, "function", at)
        functions.append(tool_form(take(function, "name", str, at, required=True),
                                   take(function, "description", str, at, default=""),
                                   take(function, "parameters", dict, at, default={})))
    if others and not functions:
        raise WireError(400, f"tools: tools of type '{others[0]}' are not supported by this server")
    if others:
        log.warning("tools of these types were left out: %s", ", ".join(others))
    return functions


def any_strict(tools: list[Object]) -> bool:
    """Whether one of the tools of a body is strict: then the calls of all are held to their schemas."""
    return any(nested(tool, "function", "")[0].get("strict") is True for tool in tools)


def nested(value: Object, key: str, path: str) -> tuple[Object, str]:
    """What one API writes into an object of its own and the other beside it, and the path to it."""
    return (value[key], f"{path}{key}.") if isinstance(value.get(key), dict) else (value, path)


def forced_choice(kind: str, name: str | None, tools: list[Object], path: str) -> str:
    """`Request.tool_choice` for a demanded call, of the tool `name` if there is one. Raises WireError if that cannot be."""
    if not tools:
        raise WireError(400, f"tool_choice: '{kind}' needs tools to choose from")
    if name is not None and name not in [tool["function"]["name"] for tool in tools]:
        raise WireError(400, f"{path}name: Tool '{name}' not found in provided tools")
    return "any" if name is None else name


def call_arguments(value: Any) -> Object:
    """A past call's arguments as the object they should have been."""
    if isinstance(value, str):
        try:
            value = encodable(json.loads(value or "{}"), value)
        except (ValueError, RecursionError):
            pass
    return value if isinstance(value, dict) else {} if value is None else {"input": value}


def encodable(value: Any, text: str) -> Any:
    """What JSON `text` has been parsed to, with "?" for half a surrogate pair, which is no text that a tokenizer could read."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) if "\\ud" in text.lower() else value


def timestamp(seconds: float) -> str:
    """Unix seconds as RFC 3339 with microseconds, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> str:
    return timestamp(datetime.now(timezone.utc).timestamp())


def token_objects(tokens: list[Token]) -> list[Object]:
    """Log probabilities as OpenAI and Ollama write them."""
    def weight(token: Token) -> Object:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}

    return [{**weight(token), "top_logprobs": [weight(one) for one in token.top]} for token in tokens]


# ------------------------------------------------------------------ the canonical conversation


@dataclass
class Turn:
    """One thing somebody said, as a dialect found it. `role` is "system", "user", "assistant" or "tool".

    `calls` are an assistant's (id, name, arguments); `call_id` says which of them a tool's text answers.
    """

    role: str
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, Object]] = field(default_factory=list)
    call_id: str = ""

    @property
    def says_something(self) -> bool:
        if self.role == "assistant":
            return bool(self.text.strip() or self.reasoning.strip() or self.calls)
        return bool(self.text) or self.role == "tool"


def not_silent(turns: list[Turn], key: str = "messages") -> list[Turn]:
    """The turns found at `key`. Raises WireError if nothing is said in them."""
    if not any(turn.says_something for turn in turns):
        raise WireError(400, f"{key}: at least one message is required")
    return turns


def canonical(turns: Iterable[Turn]) -> list[Message]:
    """Turns in any order and number as the canonical conversation that the engine renders.

    It is append-only: when turns are added at the end, nothing changes but the last run of turns between two of the
    assistant's, and that only by what a system message after it brings along.
    """
    turns = [turn for turn in turns if turn.says_something]
    if turns and turns[-1].role == "assistant" and not (turns[-1].text.strip() or turns[-1].calls):
        turns.pop()  # nothing there to continue
    head = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    messages: list[Message] = []
    if head:
        messages.append({"role": "system", "content": "\n\n".join(turn.text for turn in head)})
    calls: list[Object] = []
    for spoken, group in itertools.groupby(turns[len(head):], lambda turn: turn.role == "assistant"):
        if spoken:
            messages.append(_answer(list(group)))
            calls = messages[-1].get("tool_calls", [])
        else:
            messages += _between(calls, group)
            calls = []
    if calls:
        messages += _between(calls, [])
    elif messages and messages[-1]["role"] == "assistant":
        messages[-1]["content"] = messages[-1]["content"].rstrip()  # templates cannot continue after a blank
    return messages


def _answer(turns: list[Turn]) -> Message:
    """Successive assistant turns as one message; what was said after a call comes before it."""
    message: Message = {"role": "assistant", "content": "\n".join(turn.text for turn in turns if turn.text.strip())}
    if reasoning := "\n".join(turn.reasoning for turn in turns if turn.reasoning.strip()):
        message["reasoning_content"] = reasoning
    if calls := [call for turn in turns for call in turn.calls]:
        message["tool_calls"] = [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                                 for id, name, arguments in calls]
    return message


def _between(calls: list[Object], turns: Iterable[Turn]) -> list[Message]:
    """What stands between two assistant messages: the results of `calls` in their order, then the user's words.

    A system message becomes a reminder right before the words of the one user message it follows, not at the head of
    several: an earlier request may have ended in those and has been prefilled like that. Without words before it, it
    ends the last result, or, after a plain answer, opens the next user message.
    """
    results: dict[str, str] = {}
    reminders: list[str] = []
    words: list[str] = []
    last_words: int | None = None
    open_ids = {call["id"] for call in calls}
    for turn in turns:
        if turn.role == "tool" and turn.call_id in open_ids:
            results[turn.call_id] = turn.text
        elif turn.role != "system":
            last_words = len(words)
            words.append(turn.text if turn.role == "user" else f"Tool result ({turn.call_id}): {turn.text}")
        else:
            reminder = f"<system-reminder>\n{turn.text}\n</system-reminder>"
            if last_words is not None:
                words.insert(last_words, reminder)
                last_words += 1
            else:
                (reminders if calls else words).append(reminder)
    messages: list[Message] = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"],
         "content": results.get(call["id"], NO_RESULT)} for call in calls]
    if reminders:
        messages[-1]["content"] = "\n".join([*filter(None, [messages[-1]["content"]]), *reminders])
    if words:
        messages.append({"role": "user", "content": "\n".join(words)})
    return messages


def chat_turns(messages: list[Object], text_of: Callable[[Object, str], str]) -> list[Turn]:
    """The turns of a chat of OpenAI's or Ollama's; `text_of` reads a message's content. A result without an id belongs to
    the first open call of its name, or else to the first."""
    turns: list[Turn] = []
    waiting: list[tuple[str, str]] = []  # (id, name) of the last calls, while they have no result
    for number, message in enumerate(messages):
        path = f"messages.{number}."
        role, text = take(message, "role", str, path, required=True).lower(), text_of(message, path)
        if role == "assistant":
            calls = list(_past_calls(message, number))
            follows = turns and turns[-1].role == "assistant"
            waiting = [*(waiting if follows else []), *((id, name) for id, name, _ in calls)]
            thoughts = (take(message, key, str, path) for key in ("reasoning_content", "reasoning", "thinking"))
            turns.append(Turn("assistant", text, next(filter(None, thoughts), ""), calls))
        elif role in ("tool", "function"):
            id, *names = (take(message, key, str, path) for key in ("tool_call_id", "tool_name", "name"))
            by_id = [call for call in waiting if call[0] == id]
            by_name = [call for call in waiting if call[1] in names]
            found = next(iter([*by_id, *by_name, *waiting]), None)
            if found:
                waiting.remove(found)
            turns.append(Turn("tool", text, call_id=found[0] if found else next(filter(None, [id, *names]), "unknown")))
        else:
            turns.append(Turn(_CHAT_ROLES.get(role, "user"), text))
    return turns


_CHAT_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}  # all others are the user's


def _past_calls(message: Object, number: int) -> Iterable[tuple[str, str, Object]]:
    """The calls of an assistant's message; those without ids get one."""
    path = f"messages.{number}."
    for place, call in enumerate(items(message, "tool_calls", dict, path)):
        at = f"{path}tool_calls.{place}."
        function = take(call, "function", dict, at, required=True)
        name = take(function, "name", str, f"{at}function.", required=True)
        yield take(call, "id", str, at) or f"call_{number}_{place}", name, call_arguments(function.get("arguments"))


def ask_for_json(request: Request, schema: Object | None) -> None:
    """Demands an answer in JSON, of any object or of what matches a schema. The engine sees to it; the words at the end of
    the last user message let the model know beforehand."""
    request.format = "json" if schema is None else schema
    demand = f", matching this schema: {json.dumps(schema, ensure_ascii=False)}" if schema else "."
    demand = f"Answer with JSON only{demand}"
    for message in reversed(request.messages):
        if message["role"] == "user":
            message["content"] += f"\n\n{demand}"
            return
    request.messages.append({"role": "user", "content": demand})


# ================================================================== Anthropic
#
# The Messages API, of 2023-06-01 and 2026-10-21 alike: https://platform.claude.com/docs/en/api/messages

_BILLING = re.compile(r"\A(?:\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z))+")  # differs from request to request
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "ctx": "user", "msg": "user"}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False, "between_tools": False}
_SERVER_TOOLS = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "advisor_", "mcp_toolset")
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
           "tool_use": ("input_json_delta", "partial_json")}
_SIGNATURE = "bWx4LXNlcnZlcg=="  # clients do not send thinking back whose signature is empty
_STOP_REASONS = {"stop": "end_turn", "stop_sequence": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use",
                 "context": "model_context_window_exceeded", "load": "end_turn"}
_ERROR_TYPES = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
                408: "timeout_error", 409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error",
                504: "timeout_error", 529: "overloaded_error"}


def _properties(required: list[str], **kinds: str | list[str]) -> Object:
    def schema(kind: str | list[str]) -> Object:
        if isinstance(kind, list):
            return {"type": "string", "enum": kind}
        return {"type": "array", "items": {"type": "integer"}} if kind == "array" else {"type": kind}

    return {"type": "object", "properties": {name: schema(kind) for name, kind in kinds.items()}, "required": required}


_EDITING = {"path": "string", "file_text": "string", "old_str": "string", "new_str": "string", "insert_line": "integer",
            "insert_text": "string", "view_range": "array"}
# What clients run themselves and never describe: name, description and schema by the start of the tool's type.
_CLIENT_TOOLS = {
    "bash_": ("bash", "Run a command in a persistent bash session, or restart it.",
              _properties([], command="string", restart="boolean")),
    "text_editor_": ("str_replace_based_edit_tool", "View, create and edit text files.",
                     _properties(["command", "path"], command=["view", "create", "str_replace", "insert"], **_EDITING)),
    "memory_": ("memory", "Keep notes in files under /memories.", _properties(
        ["command"], command=["view", "create", "str_replace", "insert", "delete", "rename"], **_EDITING,
        old_path="string", new_path="string")),
}


# ------------------------------------------------------------------ Anthropic: the request


def anthropic_count(body: Object) -> Request:
    """The `Request` of a count_tokens body: a messages body without the need for max_tokens. Raises WireError."""
    return _anthropic_request(body, counting=True)


def _anthropic_request(body: Object, counting: bool = False) -> Request:
    """A messages body as a `Request`.

    Raises WireError 400 with the path of what is wrong. Unknown keys and betas are ignored, and so is all that only
    steers Anthropic's own caches and billing.
    """
    model = model_name(body)
    max_tokens = take(body, "max_tokens", int, required=not counting, low=0)
    _refuse_what_cannot_be_honoured(body)
    tools, deferred = _anthropic_tools(items(body, "tools", dict))
    choice, parallel = _anthropic_tool_choice(take(body, "tool_choice", dict, default={}), tools + deferred)
    thinking = take(body, "thinking", dict, default={})
    if thinking and take(thinking, "type", str, "thinking.", required=True) not in _THINKING:
        raise WireError(400, "thinking.type: Input should be 'enabled', 'adaptive', 'disabled' or 'between_tools'")
    budget = take(thinking, "budget_tokens", int, "thinking.", low=0) if thinking.get("type") == "enabled" else None
    output = take(body, "output_config", dict, default={})
    schema = _anthropic_schema(body, output)
    turns = not_silent(_anthropic_turns(items(body, "messages", dict, required=True), deferred))
    messages = canonical([Turn("system", _system_text(body.get("system") or "", "system")), *turns])
    request = Request(
        model, messages, tools=tools, deferred_tools=deferred, tool_choice=choice, parallel_tool_calls=parallel,
        strict=any_strict(body.get("tools") or []),
        sampling=Sampling(
            temperature=take(body, "temperature", float, low=0, high=2),
            top_p=take(body, "top_p", float, low=0, high=1), top_k=take(body, "top_k", int, low=0)),
        stop=[text for text in items(body, "stop_sequences", str) if text], max_tokens=max_tokens,
        thinking=_THINKING.get(thinking.get("type")), thinking_budget=budget,
        effort=take(output, "effort", str, "output_config."))
    if schema is not None:
        ask_for_json(request, schema)
    return request


def _refuse_what_cannot_be_honoured(body: Object) -> None:
    if body.get("mcp_servers"):
        raise WireError(400, "mcp_servers is not supported by this server")
    if isinstance(body.get("container"), dict) and body["container"].get("skills"):
        raise WireError(400, "container.skills is not supported by this server")
    for key in ("compaction", "thread"):
        if body.get(key) is not None:
            raise WireError(400, f"{key} is not supported by this server")


def _anthropic_schema(body: Object, output: Object) -> Object | None:
    """The JSON schema an answer has to match, if there is one. An old beta had it at the top level."""
    form = take(output, "format", dict, "output_config.") or take(body, "output_format", dict)
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise WireError(400, "output_config.format.type: Input should be 'json_schema'")
    return take(form, "schema", dict, "output_config.format.", required=True)


def _anthropic_tools(tools: list[Object]) -> tuple[list[Object], list[Object]]:
    """The tools to declare in the prompt, and the deferred ones: definitions that a tool_reference brings up."""
    declared, deferred, dropped = [], [], []
    for number, tool in enumerate(tools):
        path, kind = f"tools.{number}", str(tool.get("type") or "custom")
        if kind.startswith(_SERVER_TOOLS):
            dropped.append(kind)
            continue
        later = tool.get("defer_loading") is True
        known = next((made for start, made in _CLIENT_TOOLS.items() if kind.startswith(start)), None)
        if later and tool.get("input_schema") is None and not known:
            continue  # a placeholder
        if tool.get("input_schema") is None and known:
            name, description, schema = known
            name = take(tool, "name", str, f"{path}.", default=name)
        elif tool.get("input_schema") is None and kind != "custom":
            raise WireError(400, f"{path}: tools of type '{kind}' are not supported by this server")
        else:
            name = take(tool, "name", str, f"{path}.", required=True)
            description = take(tool, "description", str, f"{path}.", default="")
            schema = take(tool, "input_schema", dict, f"{path}.", required=True)
        if not name:
            raise WireError(400, f"{path}.name: String should have at least 1 character")
        (deferred if later else declared).append(tool_form(name, description, schema))
    names = [tool["function"]["name"] for tool in declared + deferred]
    if len(set(names)) < len(names):
        raise WireError(400, "tools: Tool names must be unique.")
    if dropped and not names:
        raise WireError(400, f"tools: '{dropped[0]}' runs on Anthropic's servers and is not supported by this server")
    if dropped:
        log.warning("tools that only Anthropic's servers run were left out: %s", ", ".join(dropped))
    if any(kind.startswith("tool_search_tool_") for kind in dropped):  # nothing would ever bring them up
        return declared + deferred, []
    return declared, deferred


def _anthropic_tool_choice(choice: Object, tools: list[Object]) -> tuple[str, bool]:
    """`Request.tool_choice` and whether several calls in one turn are welcome."""
    kind = choice.get("type", "auto")
    if kind not in ("auto", "any", "tool", "none"):
        raise WireError(400, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    if kind in ("any", "tool"):
        name = take(choice, "name", str, "tool_choice.", required=True) if kind == "tool" else None
        kind = forced_choice(kind, name, tools, "tool_choice.")
    return kind, not take(choice, "disable_parallel_tool_use", bool, "tool_choice.", default=False)


def _system_text(content: Any, path: str) -> str:
    """A system prompt or message without the client's billing line."""
    texts = (_block_text(block, f"{path}.{number}") for number, block in enumerate(content_blocks(content, path)))
    texts = [_BILLING.sub("", text) for text in texts if text]
    return "\n\n".join(text.rstrip("\n") for text in texts if text.strip())


def _anthropic_turns(messages: list[Object], deferred: list[Object]) -> list[Turn]:
    """The turns of a messages array. Raises WireError if the assistant has the last word with a call in it."""
    definitions = {tool["function"]["name"]: json.dumps(tool, ensure_ascii=False) for tool in deferred}
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        role = _ROLES.get(take(message, "role", str, f"{path}.", required=True))
        if role is None:
            raise WireError(400, f"{path}.role: Input should be 'user', 'assistant' or 'system'")
        if message.get("content") is None:
            raise WireError(400, f"{path}.content: Field required")
        if role == "system":
            turns.append(Turn("system", _system_text(message["content"], f"{path}.content")))
        else:
            path = f"{path}.content"
            turns += _message_turns(role, content_blocks(message["content"], path), path, definitions)
    last = next((turn for turn in reversed(turns) if turn.role != "system"), Turn("user"))
    if last.calls:
        raise WireError(400, (
            f"messages.{len(messages) - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(id for id, _, _ in last.calls)}. Each `tool_use` block must have a corresponding "
            "`tool_result` block in the next message."))
    return turns


def _message_turns(role: str, blocks: list[Object], path: str, definitions: dict[str, str]) -> list[Turn]:
    """One message as turns: tool results first, then everything that was said around them."""
    results: list[Turn] = []
    said = Turn(role)
    texts, thoughts = [], []
    for number, block in enumerate(blocks):
        at = f"{path}.{number}"
        kind = block.get("type")
        if kind == "tool_use" and role == "assistant":
            id, name = (take(block, key, str, f"{at}.", required=True) for key in ("id", "name"))
            said.calls.append((id, name, call_arguments(block.get("input"))))
        elif kind == "tool_result" and role == "user":
            id = take(block, "tool_use_id", str, f"{at}.", required=True)
            results.append(Turn("tool", _result_text(block, at, definitions), call_id=id))
        elif kind == "thinking":
            thoughts.append(take(block, "thinking", str, f"{at}.", default=""))
        else:
            texts.append(_block_text(block, at, definitions))
    said.text = "\n".join(text for text in texts if text and (text.strip() or role == "user"))
    said.reasoning = "\n".join(filter(None, thoughts))
    return [*results, said]


def _joined(content: Any, path: str, definitions: dict[str, str] | None = None) -> str:
    """The text of content inside a block."""
    blocks = [] if content is None else content_blocks(content, path)
    texts = (_block_text(block, f"{path}.{number}", definitions) for number, block in enumerate(blocks))
    return "\n".join(filter(None, texts))


def _result_text(block: Object, path: str, definitions: dict[str, str]) -> str:
    text = _joined(block.get("content"), f"{path}.content", definitions)
    return f"Error: {text}" if block.get("is_error") is True and not text.startswith("Error") else text


def _block_text(block: Object, path: str, definitions: dict[str, str] | None = None) -> str:
    """A block as text for the model, "" for what has no meaning here. `definitions` are the deferred tools' by name."""
    kind = take(block, "type", str, f"{path}.", required=True)
    if kind == "text":
        return take(block, "text", str, f"{path}.", required=True)
    if kind == "image":
        if take(block, "source", dict, f"{path}.", required=True).get("type") == "file":
            raise WireError(400, f"{path}.source: files are not supported by this server")
        return IMAGE_NOTE
    if kind in ("document", "search_result"):
        about = [take(block, key, str, f"{path}.") for key in ("title", "context")]
        if kind == "document":
            return "\n".join(filter(None, [*about, _document_text(block, path)]))
        origin = take(block, "source", str, f"{path}.")
        return "\n".join(filter(None, [*about, origin, _joined(block.get("content"), f"{path}.content")]))
    if kind == "tool_reference":
        name = take(block, "tool_name", str, f"{path}.", required=True)
        return (definitions or {}).get(name, name)
    if kind == "compaction":
        return take(block, "content", str, f"{path}.", default="")
    if kind == "container_upload":
        raise WireError(400, f"{path}: files are not supported by this server")
    if kind != "redacted_thinking":
        log.info("%s: left out a block of type %s", path, kind)
    return ""


def _document_text(block: Object, path: str) -> str:
    source = take(block, "source", dict, f"{path}.", required=True)
    if source.get("type") == "text":
        return take(source, "data", str, f"{path}.source.", required=True)
    if source.get("type") == "content":
        return _joined(source.get("content"), f"{path}.source.content")
    raise WireError(400, f"{path}.source: only documents of text are supported by this server; send its text")


# ------------------------------------------------------------------ Anthropic: the answer


class AnthropicMessages(Reply):
    """POST /v1/messages. Blocks come strictly one after the other, so `_content` is what was streamed and what `whole`
    returns. `request_id` goes into an error event."""

    dialect = "anthropic"
    framing = "events"
    LULL = 150.0  # seconds without a real event: some clients give up after 300, and do not count pings

    def __init__(self, body: Object, request_id: str = ""):
        self.request = _anthropic_request(body)
        self.stream = take(body, "stream", bool, default=False)
        self.request_id = request_id
        # "updates" are notes between calls, for which local models have no place: reasoning is not shown for them either.
        self._hides_thinking = (body.get("thinking") or {}).get("display") in ("omitted", "updates")
        self._content: list[Object] = []
        self._open = ""  # the type of the block being written
        self._blank = ""  # leading blanks of a text that may turn out to be nothing else
        self._message: Object = {}

    def open(self, generation: Any) -> list[Object]:
        self._message = {
            "id": f"msg_{generation.id}", "type": "message", "role": "assistant", "model": self.request.model,
            "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None, "container": None,
            "usage": _anthropic_usage(Usage(generation.prompt_tokens, generation.cached_tokens, 1))}
        return [{"type": "message_start", "message": self._message}]

    def event(self, event: Event) -> list[Object]:
        match event:
            case Thinking(text):
                return self._thinking(text)
            case Text(text):
                return self._text(text)
            case ToolStart(id, name):
                return [*self._start({"type": "tool_use", "id": id, "name": name, "input": {}}),
                        self._delta("input_json_delta", partial_json="")]
            case ToolInput(piece):
                return [self._delta("input_json_delta", partial_json=piece)]
            case ToolEnd(arguments):
                self._content[-1]["input"] = arguments
                return self._stop()
            case Done():
                return self._done(event)
        return []

    def ping(self, lull: float = 0.0) -> list[Object]:
        if lull < self.LULL:
            return [{"type": "ping"}]
        out = [] if self._open else self._start({"type": "text", "text": ""})
        kind, key = _DELTAS[self._open]
        return [*out, self._delta(kind, **{key: ""})]

    def failure(self, error: Exception) -> list[Object]:
        return [anthropic_error(error, self.request_id)[2]]

    def whole(self) -> Object:
        return self._message

    def _thinking(self, text: str) -> list[Object]:
        out = [] if self._open == "thinking" else self._start({"type": "thinking", "thinking": "", "signature": ""})
        if text and not self._hides_thinking:
            self._content[-1]["thinking"] += text
            out.append(self._delta("thinking_delta", thinking=text))
        return out

    def _text(self, text: str) -> list[Object]:
        out = []
        if self._open != "text":
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return []
            out = self._start({"type": "text", "text": ""})
        self._content[-1]["text"] += text
        return [*out, self._delta("text_delta", text=text)]

    def _done(self, done: Done) -> list[Object]:
        out = self._stop() if self._content else [*self._start({"type": "text", "text": ""}), *self._stop()]
        ending = {"stop_reason": _STOP_REASONS[done.reason], "stop_sequence": done.stop_sequence, "stop_details": None}
        usage = _anthropic_usage(done.usage)
        created = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
        self._message = {**self._message, **ending, "content": self._content,
                         "usage": {**usage, "cache_creation": created, "service_tier": "standard"}}
        return [*out, {"type": "message_delta", "delta": ending, "usage": usage}, {"type": "message_stop"}]

    def _start(self, block: Object) -> list[Object]:
        out = self._stop()
        self._blank, self._open = "", block["type"]
        self._content.append(dict(block))
        out.append({"type": "content_block_start", "index": len(self._content) - 1, "content_block": block})
        return out + (self.ping() if len(self._content) == 1 else [])

    def _delta(self, kind: str, **piece: str) -> Object:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": {"type": kind, **piece}}

    def _stop(self) -> list[Object]:
        if not self._open:
            return []
        out = [{"type": "content_block_stop", "index": len(self._content) - 1}]
        if self._open == "thinking":
            self._content[-1]["signature"] = _SIGNATURE
            out.insert(0, self._delta("signature_delta", signature=_SIGNATURE))
        self._open = ""
        return out


def _anthropic_usage(usage: Usage) -> Object:
    """Token counts such that input, cache reads and cache creation add up to the whole prompt."""
    return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.thinking_tokens}}


def anthropic_error(error: Exception, request_id: str) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception. What will fail again is 4xx or tells clients not to retry."""
    headers: dict[str, str] = {}
    match error:
        case WireError():
            status, message, headers = error.status, error.message, error.headers
        case ModelNotFound():
            status, message = 404, f"model: {error.model} (installed: {', '.join(error.installed) or 'none'})"
        case InvalidRequest():
            status, message = 400, str(error)
        case ModelLoadError():
            status, message, headers = 400, str(error), {"x-should-retry": "false"}
        case EngineClosed() | EngineBusy():
            status, message, headers = 529, f"Overloaded: {error}", {"retry-after": "1"}
        case EngineError():
            status, message = 500, str(error)
        case _:
            status, message = 500, "internal error"
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, headers, {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


# ------------------------------------------------------------------ Anthropic: models


def anthropic_model(model: LocalModel) -> Object:
    """GET /v1/models/{id}: one object that validates in Anthropic's and in OpenAI's clients."""
    return {**_model(model.name, model.modified, "mlx"),
            "max_input_tokens": model.context_length, "max_tokens": model.context_length}


def upstream_model(tag: Object) -> Object:
    """The same for a model that an upstream lists as `tag`, an object of GET /api/tags."""
    try:
        modified = max(0.0, datetime.fromisoformat(tag["modified_at"]).timestamp())
    except (KeyError, TypeError, ValueError):
        modified = 0.0
    return _model(tag["name"], modified, "upstream")


def _model(name: str, modified: float, owner: str) -> Object:
    return {"type": "model", "id": name, "display_name": name, "created_at": timestamp(modified), "lifecycle": "active",
            "object": "model", "created": int(modified), "owned_by": owner}


def anthropic_models(models: list[LocalModel], query: dict[str, str], tags: Iterable[Object] = ()) -> Object:
    """GET /v1/models?limit&after_id&before_id. Raises WireError for a bad limit or an id that is not there.

    The page is 1000 by default, not Anthropic's 20: OpenAI's clients read the same answer and do not turn pages. `tags` are
    what an upstream lists.
    """
    everything = [*map(anthropic_model, models), *map(upstream_model, _not_hidden(tags, models))]
    limit = query.get("limit") or "1000"
    if not re.fullmatch(r"\d{1,4}", limit, re.ASCII) or not 1 <= int(limit) <= 1000:
        raise WireError(400, "limit: Input should be an integer between 1 and 1000")
    names, start, end = [model["id"] for model in everything], 0, len(everything)
    for key in ("after_id", "before_id"):
        if query.get(key) and query[key] not in names:
            raise WireError(400, f"{key}: no model '{query[key]}'")
    if query.get("after_id"):
        start = names.index(query["after_id"]) + 1
    if query.get("before_id"):
        end = names.index(query["before_id"])
        data = everything[max(start, end - int(limit)):end]
    else:
        data = everything[start:start + int(limit)]
    return {"object": "list", "data": data, "has_more": len(data) < end - start,
            "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}


# ================================================================== Ollama
#
# The native API: https://github.com/ollama/ollama/blob/main/docs/api.md and api/types.go

_OPTIONS = {  # type by name; others are ignored, as Ollama does
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
                     "frequency_penalty"), (float, "float32")),
    **dict.fromkeys(("num_predict", "num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "top_k",
                     "seed", "repeat_last_n", "draft_num_predict"), (float, "integer")),
    "use_mmap": (bool, "boolean"),
}
_SHOWN = {**{key: key for key in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")},
          "repetition_penalty": "repeat_penalty", "repetition_context": "repeat_last_n"}  # our words, and Ollama's
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_PIECE = 8_000  # characters of text in a line: escaped, it stays below the 128 KiB some clients can read
_NEVER = "2318-01-01T00:00:00.000000Z"  # the last moment Go can count nanoseconds to


# ------------------------------------------------------------------ Ollama: the request


def parse_keep_alive(value: Any) -> float | None:
    """`keep_alive` in seconds, -1 for ever, None if absent. Takes numbers and Go durations ("1h30m"), and, more kindly
    than Ollama, numbers as strings. Raises WireError."""
    if value is None:
        return None
    seconds = value if is_a(value, float) else None
    if isinstance(value, str):
        sign, digits = (-1 if "-" in value[:1] else 1), value.removeprefix("-").removeprefix("+")
        if re.fullmatch(r"\d+\.?\d*|\.\d+", digits, re.ASCII):
            seconds = sign * float(digits)
        elif digits and not _DURATION.sub("", digits):
            seconds = sign * sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(digits))
    if seconds is None or not math.isfinite(seconds):
        raise WireError(400, f"time: invalid duration {json.dumps(value, ensure_ascii=False)}")
    return -1.0 if seconds < 0 or seconds > 9e9 else float(seconds)  # Go counts nanoseconds in 63 bits


def _ollama_name(body: Object, status: int, nameless: str) -> str:
    """The model that a body asks for; `status` and `nameless` are the error when it names none. Raises WireError."""
    name = take(body, "model", str, default="")
    if not name:
        raise WireError(status, nameless)
    if re.search(r"[\s\x00-\x1f]", name):
        raise WireError(400, "invalid model name")
    return name


def _ollama_options(body: Object) -> Object:
    """The options given, checked. Integers may be written as floats."""
    options = {key: value for key, value in take(body, "options", dict, default={}).items() if value is not None}
    for key, (kind, said) in _OPTIONS.items():
        if key in options and not is_a(options[key], kind):
            raise WireError(400, f'option "{key}" must be of type {said}')
        if key in options and said == "integer":
            options[key] = max(-2**62, min(int(options[key]), 2**62))
    stop = options.get("stop", [])
    options["stop"] = [stop] if isinstance(stop, str) else stop
    if not isinstance(options["stop"], list):
        raise WireError(400, 'option "stop" must be of type array')
    if not all(isinstance(text, str) for text in options["stop"]):
        raise WireError(400, 'option "stop" must be of an array of strings')
    return options


def _ollama_sampling(options: Object) -> Sampling:
    seed, temperature, top_k = options.get("seed", -1), options.get("temperature"), options.get("top_k")
    window = options.get("repeat_last_n")  # 0: no penalty, negative: everything
    return Sampling(
        temperature=None if temperature is None else max(0.0, temperature), top_p=options.get("top_p"),
        top_k=None if top_k is None else max(0, top_k), min_p=options.get("min_p"),
        repetition_penalty=1.0 if window == 0 else options.get("repeat_penalty"),
        repetition_context=1 << 20 if window is not None and window < 0 else window or None,
        presence_penalty=options.get("presence_penalty"), frequency_penalty=options.get("frequency_penalty"),
        seed=seed if seed >= 0 else None)


def _ollama_think(body: Object) -> tuple[bool | None, str | None]:
    think = body.get("think")
    if think is None or isinstance(think, bool):
        return think, None
    if think not in ("high", "medium", "low", "max"):
        raise WireError(400, f"invalid think value: {json.dumps(think, ensure_ascii=False)} "
                             '(must be "high", "medium", "low", "max", true, or false)')
    return True, think


def _ollama_images(body: Object, path: str = "") -> list[str]:
    """A note for each image."""
    for image in items(body, "images", str, path):
        data = re.sub(r"[\r\n]", "", image.partition(",")[2] if image.startswith("data:") else image)
        wrong = re.search(r"[^A-Za-z0-9+/=]|=(?!=?\Z)", data)
        if wrong or len(data) % 4:
            raise WireError(400, f"illegal base64 data at input byte {wrong.start() if wrong else len(data)}")
    return [IMAGE_NOTE] * len(body.get("images") or [])


def _ollama_text(message: Object, path: str) -> str:
    said = take(message, "content", str, path, default="")
    return "\n".join(filter(None, [*_ollama_images(message, path), said]))


# ------------------------------------------------------------------ Ollama: the answer


class _OllamaReply(Reply):
    """What chat and generate have in common: everything but the name of the place where the text stands.

    Tool calls go out whole. Counts and durations stand in the last object only, since some clients add them up.
    """

    dialect = "ollama"
    framing = "lines"
    purpose: str  # what a model must be able to do, in the words of the error
    nameless: tuple[int, str]  # status and text of the error when no model is named
    _tells_context = False  # whether the answer ends with the tokens that another one can go on from

    def __init__(self, body: Object):
        if not isinstance(body, dict):
            raise WireError(400, "Input should be an object")
        count = take(body, "top_logprobs", int, default=0)
        if not 0 <= count <= 20:
            raise WireError(400, "top_logprobs must be between 0 and 20")
        if take(body, "_debug_render_only", bool, default=False):
            raise WireError(400, "_debug_render_only is not supported by this server")
        name = _ollama_name(body, *self.nameless)
        self.stream = take(body, "stream", bool, default=True)
        options = _ollama_options(body)
        limit = options.get("num_predict", -1)
        thinking, effort = _ollama_think(body)
        self.request = Request(
            name, sampling=_ollama_sampling(options), stop=[text for text in options["stop"] if text],
            max_tokens=limit if limit >= 0 else None, thinking=thinking, effort=effort,
            logprobs=count if take(body, "logprobs", bool, default=False) else None,
            keep_alive=parse_keep_alive(body.get("keep_alive")))
        self._format = body.get("format") or None
        if self._format not in (None, "json") and not isinstance(self._format, dict):
            raise WireError(400, f"invalid format: {json.dumps(self._format, ensure_ascii=False)}; "
                                 'expected "json" or a valid JSON Schema object')
        self._text = self._thoughts = ""
        self._tokens: list[Object] = []
        self._calling: ToolStart | None = None
        self._calls: list[Object] = []
        self._ending: Object = {"done_reason": "unload"}

    def check(self, model: LocalModel) -> None:
        if "completion" not in model.capabilities:
            raise WireError(400, f'"{self.request.model}" does not support {self.purpose}')
        if self.request.thinking and "thinking" not in model.capabilities:
            raise WireError(400, f'"{self.request.model}" does not support thinking')

    def event(self, event: Event) -> list[Object]:
        match event:
            case Thinking(text):
                self._thoughts += text
                return [self._object("", thinking=piece) for piece in _pieces(text)]
            case Text(text, tokens):
                self._text += text
                self._tokens += token_objects(tokens)
                out = [self._object(piece) for piece in _pieces(text)]
                return [out[0] | _weighed(token_objects(tokens)), *out[1:]]
            case ToolStart():
                self._calling = event
            case ToolEnd(cut=True):
                log.info("a call of %s was cut off and left out", self._calling.name)
            case ToolEnd(arguments):
                # The id is made from the engine's, so that both always name the same call.
                id = f"call_{hashlib.sha256(self._calling.id.encode()).hexdigest()[:8]}"
                function = {"index": len(self._calls), "name": self._calling.name, "arguments": arguments}
                self._calls.append({"id": id, "function": function})
                return [self._object("", tool_calls=self._calls[-1:])]
            case Done():
                self._ending = _ollama_ending(event, self._tells_context)
                return [self._object("", done=True) | self._ending]
        return []

    def ping(self, lull: float = 0.0) -> list[Object]:
        return [self._object("")]

    def failure(self, error: Exception) -> list[Object]:
        return [ollama_error(error)[2]]

    def whole(self) -> Object:
        said = self._object(self._text, done=True, thinking=self._thoughts, tool_calls=self._calls)
        return said | _weighed(self._tokens) | self._ending

    def _object(self, text: str, done: bool = False, **more: str | list[Object]) -> Object:
        said = self._said(text, {key: value for key, value in more.items() if value})
        return {"model": self.request.model, "created_at": now(), **said, "done": done}

    def _only_load(self) -> None:
        """There is nothing to answer: the model is loaded or unloaded, and one object says so."""
        self.stream = False
        self.unload = self.request.keep_alive == 0

    def _said(self, text: str, more: Object) -> Object:
        raise NotImplementedError


class OllamaChat(_OllamaReply):
    """POST /api/chat."""

    purpose = "chat"
    nameless = 400, "model is required"

    def __init__(self, body: Object):
        super().__init__(body)
        messages = items(body, "messages", dict)
        self.request.tools = function_tools(items(body, "tools", dict))
        if not messages:
            return self._only_load()
        self.request.messages = canonical(chat_turns(messages, _ollama_text)) or [{"role": "user", "content": ""}]
        if self._format:
            ask_for_json(self.request, None if self._format == "json" else self._format)

    def _said(self, text: str, more: Object) -> Object:
        return {"message": {"role": "assistant", "content": text, **more}}


class OllamaGenerate(_OllamaReply):
    """POST /api/generate."""

    purpose = "generate"
    nameless = 404, "model '' not found"

    def __init__(self, body: Object):
        super().__init__(body)
        prompt, system, template, suffix = (
            take(body, key, str, default="") for key in ("prompt", "system", "template", "suffix"))
        raw = take(body, "raw", bool, default=False)
        images = _ollama_images(body)
        self.request.context, self._tells_context = items(body, "context", int), not raw
        if not prompt and self.request.keep_alive == 0:
            return self._only_load()
        if raw and (template or system or self.request.context):
            raise WireError(400, "raw mode does not support template, system, or context")
        if template:
            raise WireError(400, "template is not supported by this server: models use their own")
        if raw and self._format:
            raise WireError(400, "raw mode does not support format")
        if not prompt:
            return self._only_load()
        if raw or suffix:
            self.request.prompt, self.request.suffix = prompt, suffix
            return
        self.request.messages = canonical([Turn("system", system), Turn("user", "\n".join([*images, prompt]))])
        if self._format:
            ask_for_json(self.request, None if self._format == "json" else self._format)

    def check(self, model: LocalModel) -> None:
        super().check(model)
        if self.request.suffix and "insert" not in model.capabilities:
            raise WireError(400, f"{self.request.model} does not support insert")

    def _said(self, text: str, more: Object) -> Object:
        return {"response": text, **more}


class OllamaEmbed(Embeddings):
    """POST /api/embed."""

    dialect = "ollama"

    def __init__(self, body: Object):
        given = body.get("input")
        texts = [given] if isinstance(given, str) and given else given or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise WireError(400, "invalid input type")
        _ollama_options(body)
        super().__init__(_ollama_name(body, 404, "model '' not found"), texts,
                         truncate=take(body, "truncate", bool, default=True),
                         dimensions=take(body, "dimensions", int, low=0) or None,
                         keep_alive=parse_keep_alive(body.get("keep_alive")))

    def whole(self) -> Object:
        seconds = {"total": sum(usage.total_seconds for usage in self.usages),
                   "load": sum(usage.load_seconds for usage in self.usages[:1])}
        return {"model": self.request.model, "embeddings": self.unit_vectors(), "prompt_eval_count": self.tokens,
                **{f"{name}_duration": int(value * 1e9) for name, value in seconds.items()}}


class OllamaEmbeddings(Embeddings):
    """POST /api/embeddings, the older one: a single vector as the model gives it."""

    dialect = "ollama"

    def __init__(self, body: Object):
        prompt = take(body, "prompt", str, default="")
        _ollama_options(body)
        super().__init__(_ollama_name(body, 400, "model is required"), [prompt] if prompt else [], truncate=True,
                         keep_alive=parse_keep_alive(body.get("keep_alive")))

    def whole(self) -> Object:
        return {"embedding": self.vectors[0] if self.vectors else []}


def _pieces(text: str) -> list[str]:
    return [text[at:at + _PIECE] for at in range(0, len(text), _PIECE)]


def _weighed(tokens: list[Object]) -> Object:
    return {"logprobs": tokens} if tokens else {}


def _ollama_ending(done: Done, tells_context: bool) -> Object:
    """The fields that close an answer. Durations are nanoseconds."""
    if done.reason == "load":
        return {"done_reason": "load"}
    usage = done.usage
    seconds = {"total": usage.total_seconds, "load": usage.load_seconds, "prompt_eval": usage.prefill_seconds,
               "eval": usage.decode_seconds}
    return {"done_reason": "length" if done.reason in ("length", "context") else "stop",
            **({"context": done.tokens} if tells_context else {}),
            **{f"{name}_duration": int(value * 1e9) for name, value in seconds.items()},
            "prompt_eval_count": usage.prompt_tokens, "eval_count": usage.completion_tokens}


def ollama_error(error: Exception) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception."""
    headers: dict[str, str] = {}
    match error:
        case WireError():
            status, message, headers = error.status, error.message, error.headers
        case ModelNotFound():
            status, message = 404, f"model '{error.model}' not found"
        case PromptTooLong():
            status, message = 400, (f"input length ({error.tokens} tokens) exceeds the model's maximum context length "
                                    f"({error.maximum} tokens)")
        case InvalidRequest() | ModelLoadError():
            status, message = 400, str(error)
        case EngineBusy():
            status, message = 503, "server busy, please try again.  maximum pending requests exceeded"
        case EngineClosed():
            status, message = 503, f"server busy, please try again.  {error}"
        case EngineError():
            status, message = 500, str(error)
        case _:
            status, message = 500, "internal error"
    return status, headers, {"error": message}


# ------------------------------------------------------------------ Ollama: models


def _tagged(name: str) -> str:
    """A name with an explicit tag, without which clients do not find it again."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _details(model: LocalModel) -> Object:
    return {"parent_model": "", "format": "safetensors", "family": model.family, "families": [model.family],
            "parameter_size": model.parameter_size, "quantization_level": model.quantization,
            "context_length": model.context_length, "embedding_length": model.embedding_length}


def _listed(model: LocalModel, size: int) -> Object:
    return {"name": _tagged(model.name), "model": _tagged(model.name), "size": size, "digest": model.digest,
            "details": _details(model)}


def find_tag(tags: Iterable[Object], name: str) -> Object | None:
    """The one of an upstream's tag objects that a name means."""
    return next((tag for tag in tags if _tagged(tag["name"]).lower() == _tagged(name).lower()), None)


def _not_hidden(tags: Iterable[Object], models: list[LocalModel]) -> list[Object]:
    """An upstream's tag objects without those whose name is a local model's."""
    local = {_tagged(model.name).lower() for model in models}
    return [tag for tag in tags if _tagged(tag["name"]).lower() not in local]


def ollama_tags(models: list[LocalModel], tags: Iterable[Object] = ()) -> Object:
    """GET /api/tags: the installed models, newest first, then what an upstream lists as `tags`."""
    newest = sorted(models, key=lambda model: model.modified, reverse=True)
    return {"models": [{**_listed(model, model.size), "modified_at": timestamp(model.modified),
                        "capabilities": list(model.capabilities)} for model in newest] + _not_hidden(tags, models)}


def ollama_show(model: LocalModel, context_length: int, template: str, generation: Object, name: str,
                preset: Preset | None = None) -> Object:
    """POST /api/show: `context_length` in tokens, the chat template's text, the model's generation_config.json, the name the
    client asked for and the preset it means."""
    preset = preset or Preset(name, model.name, model.modified)
    config = {**model.config, **(model.config.get("text_config") or {})}
    numbers = {
        "context_length": context_length, "embedding_length": model.embedding_length,
        "block_count": config.get("num_hidden_layers"), "attention.head_count": config.get("num_attention_heads"),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "feed_forward_length": config.get("intermediate_size"), "vocab_size": config.get("vocab_size")}
    chosen = {key: value for key, value in vars(preset.sampling).items() if value is not None}
    defaults = {key: value for key, value in {**generation, **chosen}.items() if key in _SHOWN and is_a(value, float)}
    parameters = [(_SHOWN[key], value) for key, value in defaults.items()]
    parameters += [("num_predict", preset.max_tokens)] * (preset.max_tokens is not None)
    parameters += [("stop", json.dumps(stop, ensure_ascii=False)) for stop in preset.stop]
    system = [f'SYSTEM """{preset.system}"""'] if preset.system else []
    modelfile = [f"FROM {model.name}", *system, *(f"PARAMETER {key} {value}" for key, value in parameters)]
    return {
        "license": "", "modelfile": "\n".join(modelfile) + "\n", "template": template, "system": preset.system,
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameters),
        **({"messages": preset.messages} if preset.messages else {}),
        "details": _details(model), "capabilities": list(model.capabilities), "modified_at": timestamp(preset.modified),
        "model_info": {
            "general.architecture": model.family, "general.basename": name, "general.parameter_count": model.parameters,
            **{f"{model.family}.{key}": value for key, value in numbers.items() if is_a(value, int)}}}


def ollama_create(body: Object, name: str, base: Preset) -> Preset:
    """POST /api/create: a preset called `name` for the model of `base`, whose defaults it takes where it has none. Raises
    WireError; weights and templates are not made here."""
    for key in ("files", "adapters", "quantize", "template", "renderer", "parser"):
        if body.get(key):
            raise WireError(400, f"'{key}' is not supported by this server: a model can be created 'from' an installed one")
    given = {**body, "options": take(body, "parameters", dict, default={})}
    options = _ollama_options(given)
    limit = options.get("num_predict", -1)
    turns = chat_turns(items(body, "messages", dict), _ollama_text)
    messages = canonical([Turn("system", take(body, "system", str, default="") or base.system), *turns])
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    if messages and messages[-1]["role"] != "assistant":
        raise WireError(400, "messages: the last one should be the assistant's")
    sampling = _ollama_sampling(options)
    kept = {key: value for key, value in vars(base.sampling).items() if getattr(sampling, key) is None}
    return Preset(name, base.model, system=system, messages=messages or base.messages, sampling=replace(sampling, **kept),
                  stop=[text for text in options["stop"] if text] or base.stop,
                  max_tokens=limit if limit >= 0 else base.max_tokens)


def checked_name(name: Any, said: str) -> str:
    """A name that a model may get, by Ollama's rules. Raises WireError with what is `said` of one that is none."""
    if not is_a(name, str) or not re.fullmatch(r"\w[\w.-]{0,79}(/\w[\w.-]{0,79}){0,2}(:\w[\w.-]{0,79})?", name, re.ASCII):
        raise WireError(400, said)
    return name


def ollama_ps(loaded: list[Loaded]) -> Object:
    """GET /api/ps: the models in memory, longest-lived first."""
    lasting = sorted(loaded, key=lambda one: math.inf if one.expires is None else one.expires, reverse=True)
    return {"models": [{**_listed(one.model, one.size), "size_vram": one.size, "context_length": one.context_length,
                        "expires_at": _NEVER if one.expires is None else timestamp(one.expires)} for one in lasting]}


# ================================================================== OpenAI
#
# Chat completions, completions and responses: https://platform.openai.com/docs/api-reference

_FINISH_REASONS = {"length": "length", "context": "length", "tool_calls": "tool_calls"}  # otherwise "stop"
_MOST_CHOICES = 32  # of one request
_MOST_TEXTS = 2048  # to embed in one request, as OpenAI has it
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
_NOT_KEPT = ("previous_response_id", "conversation", "prompt", "background")  # what a server would have to remember


# ------------------------------------------------------------------ OpenAI: the request


def _openai_request(body: Object, *limits: str) -> Request:
    """What all three bodies have in common. `limits` are the names of the bound on the answer's tokens; -1 is none.

    Raises WireError 400 with the path of what is wrong. Unknown keys are ignored, and so is all that only steers OpenAI's
    own caches, storage and billing.
    """
    model = model_name(body)
    bounds = [take(body, key, int, low=-1) for key in limits]
    bound = next((bound for bound in bounds if bound is not None), None)
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else items(body, "stop", str)
    top_k = take(body, "top_k", int, low=-1)
    return Request(
        model, stop=[text for text in stop if text], max_tokens=None if bound == -1 else bound,
        sampling=Sampling(
            temperature=take(body, "temperature", float, low=0, high=2), top_p=take(body, "top_p", float, low=0, high=1),
            top_k=None if top_k is None else max(0, top_k), min_p=take(body, "min_p", float, low=0, high=1),
            repetition_penalty=take(body, "repetition_penalty", float, low=0),
            presence_penalty=take(body, "presence_penalty", float, low=-2, high=2),
            frequency_penalty=take(body, "frequency_penalty", float, low=-2, high=2),
            seed=take(body, "seed", int), logit_bias=_logit_bias(take(body, "logit_bias", dict, default={}))))


def _logit_bias(given: Object) -> dict[int, float] | None:
    for key in given:
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise WireError(400, f"logit_bias: '{key}' should be the id of a token")
    return {int(key): take(given, key, float, "logit_bias.", default=0, low=-100, high=100) for key in given} or None


def _converse(request: Request, body: Object, tools: list[Object], turns: list[Turn], effort: str | None, form: Object,
              path: str) -> None:
    """Fills in what belongs to a conversation; `form` is the demanded output format, found at `path`."""
    request.messages = canonical(turns)
    request.tool_choice, request.tools = _openai_tool_choice(body, function_tools(tools))
    request.strict = any_strict(tools)
    request.parallel_tool_calls = take(body, "parallel_tool_calls", bool, default=True)
    asked = take(take(body, "chat_template_kwargs", dict, default={}), "enable_thinking", bool, "chat_template_kwargs.")
    request.thinking = effort != "none" if asked is None and effort else asked
    request.effort = effort if effort != "none" else None
    kind = take(form, "type", str, path, default="text")
    if kind == "json_schema":
        inner, path = nested(form, "json_schema", path)
        ask_for_json(request, take(inner, "schema", dict, path, default={}))
    elif kind == "json_object":
        ask_for_json(request, None)
    elif kind != "text":
        raise WireError(400, f"{path}type: Input should be 'text', 'json_object' or 'json_schema'")


def _openai_tool_choice(body: Object, tools: list[Object]) -> tuple[str, list[Object]]:
    """`Request.tool_choice`, and the tools there are to choose from."""
    given = body.get("tool_choice")
    choice = {"type": given} if isinstance(given, str) else take(body, "tool_choice", dict, default={})
    kind, name = take(choice, "type", str, "tool_choice.", default="auto"), None
    inner, path = nested(choice, kind, "tool_choice.")
    if kind == "allowed_tools":
        allowed = [nested(tool, "function", path)[0].get("name") for tool in items(inner, "tools", dict, path, required=True)]
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        kind = take(inner, "mode", str, path, default="auto")
    elif kind in ("function", "custom"):
        name = take(inner, "name", str, path, required=True)
    if kind in ("required", "function", "custom"):
        return forced_choice(kind, name, tools, path), tools
    if kind not in ("auto", "none"):
        raise WireError(400, "tool_choice: Input should be 'none', 'auto', 'required', a function or allowed tools")
    return kind, tools


def _openai_text(message: Object, path: str, key: str = "content") -> str:
    """The text of a message's content, or of a tool's output: a string or parts of any of the APIs."""
    content = message.get(key)
    parts = [] if content is None else content_blocks(content, f"{path}{key}")
    return "\n".join(filter(None, (_part_text(part, f"{path}{key}.{number}.") for number, part in enumerate(parts))))


def _part_text(part: Object, path: str) -> str:
    kind = take(part, "type", str, path, required=True)
    if kind in ("text", "input_text", "output_text", "summary_text", "reasoning_text"):
        return take(part, "text", str, path, required=True)
    if kind == "refusal":
        return take(part, "refusal", str, path, default="")
    if kind in ("image_url", "input_image"):
        return IMAGE_NOTE
    if kind in ("input_audio", "file", "input_file"):
        raise WireError(400, f"{path}type: '{kind}' is not supported by this server; send its text")
    log.info("%s left out a part of type %s", path, kind)
    return ""


# ------------------------------------------------------------------ OpenAI: chat completions and completions


class _Completions(Reply):
    """What the two have in common. Choices come one after the other: `Done` ends one, the last one ends the answer."""

    dialect = "openai"
    framing = "data"
    prefix: str  # of the answer's id
    kinds: tuple[str, str]  # what the object is called when it comes whole, and in pieces

    def __init__(self, body: Object, *limits: str):
        self.request = _openai_request(body, *limits)
        self.stream = take(body, "stream", bool, default=False)
        options = take(body, "stream_options", dict, default={})
        self._counts = take(options, "include_usage", bool, "stream_options.", default=False)
        self._n = take(body, "n", int, default=1, low=1, high=_MOST_CHOICES)
        self._prompts: list[str | list[int] | None] = [None]
        self._head: Object = {}
        self._choices: list[Object] = []  # those that have ended
        self._usages: list[Usage] = []
        self._begin()

    @property
    def requests(self) -> list[Request]:
        """One for each choice: all those of a prompt, then those of the next. Each has a seed of its own."""
        def seed(number: int) -> Sampling:
            sampling = self.request.sampling
            return replace(sampling, seed=None if sampling.seed is None else sampling.seed + number)

        return [replace(self.request, prompt=prompt, sampling=seed(number))
                for prompt in self._prompts for number in range(self._n)]

    def open(self, generation: Any) -> list[Object]:
        self._head = {"id": f"{self.prefix}-{generation.id}", "created": int(time.time()), "model": self.request.model}
        return []

    def event(self, event: Event) -> list[Object | str]:
        match event:
            case Text(text, tokens):
                piece = self._piece(text, tokens)
                self._text += text
                self._tokens += tokens
                return [self._chunk(piece)]
            case Done():
                return self._done(event)
        return []

    def ping(self, lull: float = 0.0) -> list[Object | str]:
        return [": ping"]

    def failure(self, error: Exception) -> list[Object]:
        return [openai_error(error)[2]]

    def whole(self) -> Object:
        return {**self._head, "object": self.kinds[0], "choices": self._choices, "usage": self._usage()}

    def _begin(self) -> None:
        """Before each choice."""
        self._text = ""
        self._tokens: list[Token] = []

    def _done(self, done: Done) -> list[Object | str]:
        finish = _FINISH_REASONS.get(done.reason, "stop")
        out: list[Object | str] = [self._chunk(self._piece("", []), finish)]
        self._choices.append({"index": len(self._choices), **self._choice(), "finish_reason": finish})
        self._usages.append(done.usage)
        self._begin()
        if len(self._choices) < len(self._prompts) * self._n:
            return out
        usage = [{**out[0], "choices": [], "usage": self._usage()}] if self._counts else []
        return [*out, *usage, "data: [DONE]"]

    def _chunk(self, piece: Object, finish: str | None = None, index: int | None = None) -> Object:
        choice = {"index": len(self._choices) if index is None else index, "logprobs": None, **piece, "finish_reason": finish}
        return {**self._head, "object": self.kinds[1], "choices": [choice], **({"usage": None} if self._counts else {})}

    def _usage(self) -> Object:
        """A prompt counts once, however many choices it has."""
        prompt, cached = (sum(getattr(usage, key) for usage in self._usages[::self._n])
                          for key in ("prompt_tokens", "cached_tokens"))
        written, thought = (sum(getattr(usage, key) for usage in self._usages)
                            for key in ("completion_tokens", "thinking_tokens"))
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": cached},
                "completion_tokens_details": {"reasoning_tokens": thought}}

    def _piece(self, text: str, tokens: list[Token]) -> Object:
        """The part of a chunk's choice that carries text."""
        raise NotImplementedError

    def _choice(self) -> Object:
        """The part of a whole choice that carries all of it."""
        raise NotImplementedError


class OpenAIChat(_Completions):
    """POST /v1/chat/completions. Reasoning goes by both names it has among local servers and their clients. The ids of
    calls are the engine's, by which it finds what it has generated when they come back."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def __init__(self, body: Object):
        super().__init__(body, "max_completion_tokens", "max_tokens")
        top = take(body, "top_logprobs", int, default=0, low=0, high=20)
        self.request.logprobs = top if take(body, "logprobs", bool, default=False) else None
        turns = not_silent(chat_turns(items(body, "messages", dict, required=True), _openai_text))
        form = take(body, "response_format", dict, default={})
        _converse(self.request, body, items(body, "tools", dict), turns, take(body, "reasoning_effort", str), form,
                  "response_format.")

    def open(self, generation: Any) -> list[Object]:
        super().open(generation)
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, index=index) for index in range(self._n)]

    def event(self, event: Event) -> list[Object | str]:
        match event:
            case Thinking(text):
                self._thoughts += text
                return [self._chunk({"delta": _reasoning(text)})]
            case ToolStart(id, name):
                self._calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
                return [self._call({**self._calls[-1], "function": {"name": name, "arguments": ""}})]
            case ToolInput(piece):
                self._calls[-1]["function"]["arguments"] += piece
                return [self._call({"function": {"arguments": piece}})]
        return super().event(event)

    def _begin(self) -> None:
        super()._begin()
        self._thoughts = ""
        self._calls: list[Object] = []

    def _call(self, piece: Object) -> Object:
        return self._chunk({"delta": {"tool_calls": [{"index": len(self._calls) - 1, **piece}]}})

    def _piece(self, text: str, tokens: list[Token]) -> Object:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens) if text else None}

    def _choice(self) -> Object:
        message = {"role": "assistant", "content": self._text or (None if self._calls else ""), "refusal": None,
                   **(_reasoning(self._thoughts) if self._thoughts else {}),
                   **({"tool_calls": self._calls} if self._calls else {})}
        return {"message": message, "logprobs": self._logprobs(self._tokens)}

    def _logprobs(self, tokens: list[Token]) -> Object | None:
        return None if self.request.logprobs is None else {"content": token_objects(tokens), "refusal": None}


def _reasoning(text: str) -> Object:
    return {"reasoning_content": text, "reasoning": text}


class OpenAICompletion(_Completions):
    """POST /v1/completions: raw text in, raw text out."""

    prefix, kinds = "cmpl", ("text_completion", "text_completion")

    def __init__(self, body: Object):
        super().__init__(body, "max_tokens")
        for key, harmless in (("echo", False), ("suffix", ""), ("best_of", 1)):
            if body.get(key) not in (None, harmless):
                raise WireError(400, f"{key}: not supported by this server")
        self.request.max_tokens = 16 if body.get("max_tokens") is None else self.request.max_tokens  # as OpenAI has it
        self.request.logprobs = take(body, "logprobs", int, low=0, high=20)
        given = body.get("prompt")
        prompts = given if isinstance(given, list) and not all(is_a(one, int) for one in given) else [given]
        for prompt in prompts:
            tokens = isinstance(prompt, list) and all(is_a(token, int) for token in prompt)
            if not (prompt and (tokens or isinstance(prompt, str))):
                raise WireError(400, "prompt: Input should be text, token ids, or a list of such, and not empty")
        if len(prompts) * self._n > _MOST_CHOICES:
            raise WireError(400, f"prompt: more than {_MOST_CHOICES} choices are not supported by this server")
        self._prompts = prompts

    def _piece(self, text: str, tokens: list[Token]) -> Object:
        return {"text": text, "logprobs": self._logprobs(tokens, len(self._text)) if text else None}

    def _choice(self) -> Object:
        return {"text": self._text, "logprobs": self._logprobs(self._tokens, 0)}

    def _logprobs(self, tokens: list[Token], offset: int) -> Object | None:
        if self.request.logprobs is None:
            return None
        ends = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
        return {"tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{one.text: one.logprob for one in token.top} for token in tokens],
                "text_offset": list(ends)[:len(tokens)]}


# ------------------------------------------------------------------ OpenAI: responses


_ITEMS = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}  # what their ids begin with
_PARTS = {  # by the item's type: the key of its parts, a part, what its events say beside it, and the names of those
    "reasoning": ("summary", {"type": "summary_text"}, {"summary_index": 0}, "reasoning_summary_part",
                  "reasoning_summary_text"),
    "message": ("content", {"type": "output_text", "annotations": [], "logprobs": []},
                {"content_index": 0, "logprobs": []}, "content_part", "output_text"),
}
_FREE = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}  # of a custom tool


class OpenAIResponses(Reply):
    """POST /v1/responses, without a memory of earlier ones. Items come strictly one after the other, so `_output` is what
    was streamed and what `whole` returns. Reasoning goes by the name of a summary, which is what clients show and send back.
    """

    dialect = "openai"
    framing = "events"

    def __init__(self, body: Object):
        self.request = _openai_request(body, "max_output_tokens")
        self.stream = take(body, "stream", bool, default=False)
        for key in _NOT_KEPT:
            if body.get(key):
                raise WireError(400, f"{key}: not supported by this server; send the whole conversation as input")
        self._spaces: dict[str, tuple[str, str]] = {}  # (namespace, name) by the name that the model sees
        tools = self._flat_tools(items(body, "tools", dict))
        self._custom = {tool["name"] for tool in tools if tool.get("parameters") is _FREE}
        if "message.output_text.logprobs" in items(body, "include", str):
            self.request.logprobs = take(body, "top_logprobs", int, default=0, low=0, high=20)
        turns = [Turn("system", take(body, "instructions", str, default="")), *not_silent(_responses_turns(body), "input")]
        effort = take(take(body, "reasoning", dict, default={}), "effort", str, "reasoning.")
        form = take(take(body, "text", dict, default={}), "format", dict, "text.", default={})
        _converse(self.request, body, tools, turns, effort, form, "text.format.")
        self._response: Object = {
            "object": "response", "model": self.request.model, "status": "in_progress", "output": [], "error": None,
            "incomplete_details": None, "instructions": body.get("instructions"), "usage": None,
            "tools": [{"type": "function", "strict": None, **tool["function"]} for tool in self.request.tools],
            "tool_choice": body.get("tool_choice") or "auto", "parallel_tool_calls": self.request.parallel_tool_calls}
        self._output: list[Object] = []
        self._open = ""  # the type of the item being written
        self._count = 0  # of events

    def open(self, generation: Any) -> list[Object]:
        self._response |= {"id": f"resp_{generation.id}", "created_at": int(time.time())}
        return [self._event("created", response=self._response), *self.ping()]

    def event(self, event: Event) -> list[Object]:
        match event:
            case Thinking(text):
                return self._say("reasoning", text)
            case Text(text, tokens):
                return self._say("message", text, token_objects(tokens))
            case ToolStart(id, called):
                space, name = self._spaces.get(called, (None, called))
                kind, key = ("custom_tool_call", "input") if called in self._custom else ("function_call", "arguments")
                return self._start(kind, call_id=id, name=name, **{key: ""}, **({"namespace": space} if space else {}))
            case ToolInput(piece) if self._open == "function_call":
                self._output[-1]["arguments"] += piece
                return [self._event("function_call_arguments.delta", **self._place(), delta=piece)]
            case ToolEnd(arguments, cut):
                out = []
                if self._open == "custom_tool_call":
                    given = arguments.get("input", "")
                    self._output[-1]["input"] = text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                    out = [self._event("custom_tool_call_input.delta", **self._place(), delta=text)]
                return [*out, *self._stop("incomplete" if cut else "completed")]
            case Done():
                return self._done(event)
        return []

    def ping(self, lull: float = 0.0) -> list[Object]:
        return [self._event("in_progress", response=self._response)]

    def failure(self, error: Exception) -> list[Object]:
        said = {"code": "server_error", "message": openai_error(error)[2]["error"]["message"]}
        return [self._event("failed", response={**self._response, "status": "failed", "error": said})]

    def whole(self) -> Object:
        return self._response

    def _flat_tools(self, tools: list[Object]) -> list[Object]:
        """The tools with those of namespaces among them."""
        flat = []
        for number, tool in enumerate(tools):
            at = f"tools.{number}."
            if tool.get("type") != "namespace":
                flat.append(_as_function(tool, at))
                continue
            space = take(tool, "name", str, at, required=True)
            for inner in items(tool, "tools", dict, at):
                name = take(inner, "name", str, f"{at}tools.", required=True)
                self._spaces[_in_space(space, name)] = (space, name)
                flat.append({**_as_function(inner, f"{at}tools."), "name": _in_space(space, name)})
        return flat

    def _say(self, kind: str, text: str, logprobs: list[Object] | None = None) -> list[Object]:
        key, part, _, part_name, text_name = _PARTS[kind]
        out = []
        if self._open != kind:
            out = self._start(kind, **{key: []}, **({"role": "assistant"} if kind == "message" else {}))
            self._output[-1][key] = [{**part, "text": ""}]
            out.append(self._event(f"{part_name}.added", **self._place(), part={**part, "text": ""}))
        out.append(self._event(f"{text_name}.delta", **self._place(), delta=text))
        said = self._output[-1][key][0]
        said["text"] += text
        if logprobs:
            said["logprobs"], out[-1]["logprobs"] = [*said["logprobs"], *logprobs], logprobs
        return out

    def _start(self, kind: str, **fields: Any) -> list[Object]:
        out = self._stop()
        self._open = kind
        id = f"{_ITEMS[kind]}_{self._response['id'].removeprefix('resp_')}{len(self._output):02}"
        self._output.append({"id": id, "type": kind, "status": "in_progress", **fields})
        return [*out, self._event("output_item.added", output_index=len(self._output) - 1, item=dict(self._output[-1]))]

    def _stop(self, status: str = "completed") -> list[Object]:
        if not self._open:
            return []
        item, where = self._output[-1], self._place()
        item["status"] = status
        if self._open in _PARTS:
            key, _, _, part_name, text_name = _PARTS[self._open]
            part = item[key][0]
            said = {name: part[name] for name in ("text", "logprobs") if name in part}
            out = [self._event(f"{text_name}.done", **where | said), self._event(f"{part_name}.done", **where, part=part)]
        elif self._open == "custom_tool_call":
            out = [self._event("custom_tool_call_input.done", **where, input=item["input"])]
        else:
            out = [self._event("function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"])]
        self._open = ""
        return [*out, self._event("output_item.done", output_index=len(self._output) - 1, item=item)]

    def _done(self, done: Done) -> list[Object]:
        status = "incomplete" if done.reason in ("length", "context") else "completed"
        out, usage = self._stop(status), done.usage
        self._response |= {
            "status": status, "output": self._output,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
                      "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                      "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                      "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens}}}
        return [*out, self._event(status, response=self._response)]

    def _place(self) -> Object:
        """Where in the output an event belongs."""
        where = _PARTS[self._open][2] if self._open in _PARTS else {}
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, **where}

    def _event(self, name: str, /, **fields: Any) -> Object:
        self._count += 1
        return {"type": f"response.{name}", "sequence_number": self._count - 1, **fields}


def _as_function(tool: Object, at: str) -> Object:
    """A custom tool, whose input is free text, as a function of one string; others as they are. A grammar that the text is to
    follow is told, not enforced."""
    if tool.get("type") != "custom":
        return tool
    form = take(tool, "format", dict, at, default={})
    told = [take(tool, "description", str, at, default=""), take(form, "definition", str, f"{at}format.", default="")]
    name = take(tool, "name", str, at, required=True)
    return {"type": "function", "name": name, "description": "\n\n".join(filter(None, told)), "parameters": _FREE}


def _in_space(space: str | None, name: str) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{space}__{name}" if space else name


def _item_call_id(item: Object, kind: str, at: str) -> str:
    """The id of the call that an item is or answers; those of the local shell may have no `call_id`."""
    own = kind.startswith("local_shell_call") and item.get("call_id") is None
    return take(item, "id" if own else "call_id", str, at, required=True)


def _responses_turns(body: Object) -> list[Turn]:
    """The turns of an input: a text, or items of which one assistant's turn may have several."""
    if isinstance(body.get("input"), str):
        return [Turn("user", body["input"])]
    turns = []
    for number, item in enumerate(items(body, "input", dict, required=True)):
        at = f"input.{number}."
        kind = take(item, "type", str, at, default="message")
        if kind == "message":
            role = take(item, "role", str, at, required=True)
            turns.append(Turn(_CHAT_ROLES.get(role, "user"), _openai_text(item, at)))
        elif kind in ("function_call", "custom_tool_call"):
            id, name = (take(item, key, str, at, required=True) for key in ("call_id", "name"))
            arguments = call_arguments(item.get("arguments")) if kind == "function_call" else {
                "input": take(item, "input", str, at, default="")}
            turns.append(Turn("assistant", calls=[(id, _in_space(take(item, "namespace", str, at), name), arguments)]))
        elif kind == "local_shell_call":
            action = take(item, "action", dict, at, required=True)
            turns.append(Turn("assistant", calls=[(_item_call_id(item, kind, at), "local_shell", action)]))
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            id = _item_call_id(item, kind, at)
            turns.append(Turn("tool", _openai_text(item, at, "output"), call_id=id))
        elif kind == "reasoning":
            turns.append(Turn("assistant", reasoning=_openai_text(item, at) or _openai_text(item, at, "summary")))
        elif kind == "item_reference":
            raise WireError(400, f"{at}type: '{kind}' is not supported by this server; send the item")
        else:
            log.info("%s left out an item of type %s", at, kind)
    return turns


# ------------------------------------------------------------------ OpenAI: embeddings


class OpenAIEmbeddings(Embeddings):
    """POST /v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

    dialect = "openai"

    def __init__(self, body: Object):
        given = body.get("input")
        texts = [given] if isinstance(given, str) or isinstance(given, list) and is_a(next(iter(given), None), int) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) or isinstance(text, list) and all(
                is_a(token, int) for token in text) for text in texts):
            raise WireError(400, "input: Input should be a string, a list of strings, or one or more lists of token ids")
        if len(texts) > _MOST_TEXTS:
            raise WireError(400, f"input: List should have at most {_MOST_TEXTS} items")
        self._format = take(body, "encoding_format", str, default="float")
        if self._format not in ("float", "base64"):
            raise WireError(400, "encoding_format: Input should be 'float' or 'base64'")
        super().__init__(model_name(body), texts, truncate=False, dimensions=take(body, "dimensions", int, low=1))

    def whole(self) -> Object:
        data = [{"object": "embedding", "index": index, "embedding": vector if self._format == "float" else _packed(vector)}
                for index, vector in enumerate(self.unit_vectors())]
        return {"object": "list", "data": data, "model": self.request.model,
                "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens}}


def _packed(vector: list[float]) -> str:
    """A vector as little-endian floats of 32 bits, in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# ------------------------------------------------------------------ OpenAI: errors


def openai_error(error: Exception) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception. Both vendors' clients try again by the same rules; only 529 is
    Anthropic's own."""
    status, headers, body = anthropic_error(error, "")
    status, message, code, param = 503 if status == 529 else status, body["error"]["message"], _CODES.get(status), None
    match error:
        case WireError() if at := re.match(r"[a-z_]\w*(\.\w+)*(?=: )", message):
            param = at[0]
        case ModelNotFound():
            message, code = str(error), "model_not_found"
        case PromptTooLong():
            message, code = (f"This model's maximum context length is {error.maximum} tokens. However, your messages "
                             f"resulted in {error.tokens} tokens."), "context_length_exceeded"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, headers, {"error": {"message": message, "type": kind, "param": param, "code": code}}
