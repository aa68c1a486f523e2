"""Anthropic's Messages API, of 2023-06-01 and 2026-10-21 alike:
https://platform.claude.com/docs/en/api/messages"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from _mlx_server.inference.protocol import (
    Done,
    EngineBusy,
    EngineClosed,
    EngineError,
    Event,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    Request,
    Sampling,
    Text,
    Thinking,
    ToolEnd,
    ToolInput,
    ToolStart,
    Usage,
)
from _mlx_server.wire.conversation import IMAGE_NOTE, Turn, ask_for_json, canonical, require_content
from _mlx_server.wire.fields import Object, WireError, content_blocks, field, items, model_name
from _mlx_server.wire.reply import Reply
from _mlx_server.wire.tools import any_strict, call_arguments, forced_choice, tool_form

log = logging.getLogger("mlx_server")


# Differs from request to request
_BILLING = re.compile(r"\A(?:\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z))+")
_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "ctx": "user",
    "msg": "user",
}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False, "between_tools": False}
_SERVER_TOOLS = (
    "web_search_",
    "web_fetch_",
    "code_execution_",
    "tool_search_tool_",
    "advisor_",
    "mcp_toolset",
)
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_SIGNATURE = "bWx4LXNlcnZlcg=="  # clients do not send thinking back whose signature is empty
_STOP_REASONS = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "context": "model_context_window_exceeded",
    "load": "end_turn",
}
_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _properties(required: list[str], **kinds: str | list[str]) -> Object:
    def schema(kind: str | list[str]) -> Object:
        if isinstance(kind, list):
            return {"type": "string", "enum": kind}
        return (
            {"type": "array", "items": {"type": "integer"}} if kind == "array" else {"type": kind}
        )

    return {
        "type": "object",
        "properties": {name: schema(kind) for name, kind in kinds.items()},
        "required": required,
    }


_EDITING = {
    "path": "string",
    "file_text": "string",
    "old_str": "string",
    "new_str": "string",
    "insert_line": "integer",
    "insert_text": "string",
    "view_range": "array",
}
# What clients run themselves and never describe: name, description and schema by the start of the
# tool's type.
_CLIENT_TOOLS = {
    "bash_": (
        "bash",
        "Run a command in a persistent bash session, or restart it.",
        _properties([], command="string", restart="boolean"),
    ),
    "text_editor_": (
        "str_replace_based_edit_tool",
        "View, create and edit text files.",
        _properties(
            ["command", "path"], command=["view", "create", "str_replace", "insert"], **_EDITING
        ),
    ),
    "memory_": (
        "memory",
        "Keep notes in files under /memories.",
        _properties(
            ["command"],
            command=["view", "create", "str_replace", "insert", "delete", "rename"],
            **_EDITING,
            old_path="string",
            new_path="string",
        ),
    ),
}


def anthropic_count(body: Object) -> Request:
    """The `Request` of a count_tokens body: a messages body without the need for max_tokens. Raises
    WireError."""
    return _anthropic_request(body, counting=True)


def _anthropic_request(body: Object, counting: bool = False) -> Request:
    """A messages body as a `Request`.

    Raises WireError 400 with the path of what is wrong. Unknown keys and betas are ignored, and so
    is all that only steers Anthropic's own caches and billing."""
    model = model_name(body)
    max_tokens = field(body, "max_tokens", int, required=not counting, low=0)
    _refuse_what_cannot_be_honoured(body)
    tools, deferred = _anthropic_tools(items(body, "tools", dict))
    choice, parallel = _anthropic_tool_choice(
        field(body, "tool_choice", dict, default={}), tools + deferred
    )
    thinking = field(body, "thinking", dict, default={})
    if thinking and field(thinking, "type", str, "thinking.", required=True) not in _THINKING:
        raise WireError(
            400,
            "thinking.type: Input should be 'enabled', 'adaptive', 'disabled' or 'between_tools'",
        )
    budget = (
        field(thinking, "budget_tokens", int, "thinking.", low=0)
        if thinking.get("type") == "enabled"
        else None
    )
    output = field(body, "output_config", dict, default={})
    schema = _anthropic_schema(body, output)
    turns = require_content(
        _anthropic_turns(items(body, "messages", dict, required=True), deferred)
    )
    messages = canonical([Turn("system", _system_text(body.get("system") or "", "system")), *turns])
    request = Request(
        model,
        messages,
        tools=tools,
        deferred_tools=deferred,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        strict=any_strict(body.get("tools") or []),
        sampling=Sampling(
            temperature=field(body, "temperature", float, low=0, high=2),
            top_p=field(body, "top_p", float, low=0, high=1),
            top_k=field(body, "top_k", int, low=0),
        ),
        stop=[text for text in items(body, "stop_sequences", str) if text],
        max_tokens=max_tokens,
        thinking=_THINKING.get(thinking.get("type")),
        thinking_budget=budget,
        effort=field(output, "effort", str, "output_config."),
    )
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
    """The JSON schema an answer has to match, if there is one. An old beta had it at the top
    level."""
    form = field(output, "format", dict, "output_config.") or field(body, "output_format", dict)
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise WireError(400, "output_config.format.type: Input should be 'json_schema'")
    return field(form, "schema", dict, "output_config.format.", required=True)


def _anthropic_tools(tools: list[Object]) -> tuple[list[Object], list[Object]]:
    """The tools to declare in the prompt, and the deferred ones: definitions that a tool_reference
    brings up."""
    declared, deferred, dropped = [], [], []
    for number, tool in enumerate(tools):
        path, kind = f"tools.{number}", str(tool.get("type") or "custom")
        if kind.startswith(_SERVER_TOOLS):
            dropped.append(kind)
            continue
        later = tool.get("defer_loading") is True
        known = next(
            (made for start, made in _CLIENT_TOOLS.items() if kind.startswith(start)), None
        )
        if later and tool.get("input_schema") is None and not known:
            continue  # a placeholder
        if tool.get("input_schema") is None and known:
            name, description, schema = known
            name = field(tool, "name", str, f"{path}.", default=name)
        elif tool.get("input_schema") is None and kind != "custom":
            raise WireError(400, f"{path}: tools of type '{kind}' are not supported by this server")
        else:
            name = field(tool, "name", str, f"{path}.", required=True)
            description = field(tool, "description", str, f"{path}.", default="")
            schema = field(tool, "input_schema", dict, f"{path}.", required=True)
        if not name:
            raise WireError(400, f"{path}.name: String should have at least 1 character")
        (deferred if later else declared).append(tool_form(name, description, schema))
    names = [tool["function"]["name"] for tool in declared + deferred]
    if len(set(names)) < len(names):
        raise WireError(400, "tools: Tool names must be unique.")
    if dropped and not names:
        raise WireError(
            400,
            f"tools: '{dropped[0]}' runs on Anthropic's servers and is not supported by this server",
        )
    if dropped:
        log.warning("tools that only Anthropic's servers run were left out: %s", ", ".join(dropped))
    # Nothing would ever bring them up
    if any(kind.startswith("tool_search_tool_") for kind in dropped):
        return declared + deferred, []
    return declared, deferred


def _anthropic_tool_choice(choice: Object, tools: list[Object]) -> tuple[str, bool]:
    """`Request.tool_choice` and whether several calls in one turn are welcome."""
    kind = choice.get("type", "auto")
    if kind not in ("auto", "any", "tool", "none"):
        raise WireError(400, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    if kind in ("any", "tool"):
        name = field(choice, "name", str, "tool_choice.", required=True) if kind == "tool" else None
        kind = forced_choice(kind, name, tools, "tool_choice.")
    return kind, not field(choice, "disable_parallel_tool_use", bool, "tool_choice.", default=False)


def _system_text(content: Any, path: str) -> str:
    """A system prompt or message without the client's billing line."""
    texts = (
        _block_text(block, f"{path}.{number}")
        for number, block in enumerate(content_blocks(content, path))
    )
    texts = [_BILLING.sub("", text) for text in texts if text]
    return "\n\n".join(text.rstrip("\n") for text in texts if text.strip())


def _anthropic_turns(messages: list[Object], deferred: list[Object]) -> list[Turn]:
    """The turns of a messages array. Raises WireError if the assistant has the last word with a
    call in it."""
    definitions = {
        tool["function"]["name"]: json.dumps(tool, ensure_ascii=False) for tool in deferred
    }
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        role = _ROLES.get(field(message, "role", str, f"{path}.", required=True))
        if role is None:
            raise WireError(400, f"{path}.role: Input should be 'user', 'assistant' or 'system'")
        if message.get("content") is None:
            raise WireError(400, f"{path}.content: Field required")
        if role == "system":
            turns.append(Turn("system", _system_text(message["content"], f"{path}.content")))
        else:
            path = f"{path}.content"
            turns += _message_turns(
                role, content_blocks(message["content"], path), path, definitions
            )
    last = next((turn for turn in reversed(turns) if turn.role != "system"), Turn("user"))
    if last.calls:
        raise WireError(
            400,
            (
                f"messages.{len(messages) - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(id for id, _, _ in last.calls)}. Each `tool_use` block must have a corresponding "
                "`tool_result` block in the next message."
            ),
        )
    return turns


def _message_turns(
    role: str, blocks: list[Object], path: str, definitions: dict[str, str]
) -> list[Turn]:
    """One message as turns: tool results first, then everything that was said around them."""
    results: list[Turn] = []
    said = Turn(role)
    texts, thoughts = [], []
    for number, block in enumerate(blocks):
        at = f"{path}.{number}"
        kind = block.get("type")
        if kind == "tool_use" and role == "assistant":
            id, name = (field(block, key, str, f"{at}.", required=True) for key in ("id", "name"))
            said.calls.append((id, name, call_arguments(block.get("input"))))
        elif kind == "tool_result" and role == "user":
            id = field(block, "tool_use_id", str, f"{at}.", required=True)
            results.append(Turn("tool", _result_text(block, at, definitions), call_id=id))
        elif kind == "thinking":
            thoughts.append(field(block, "thinking", str, f"{at}.", default=""))
        else:
            texts.append(_block_text(block, at, definitions))
    said.text = "\n".join(text for text in texts if text and (text.strip() or role == "user"))
    said.reasoning = "\n".join(filter(None, thoughts))
    return [*results, said]


def _joined(content: Any, path: str, definitions: dict[str, str] | None = None) -> str:
    """The text of content inside a block."""
    blocks = [] if content is None else content_blocks(content, path)
    texts = (
        _block_text(block, f"{path}.{number}", definitions) for number, block in enumerate(blocks)
    )
    return "\n".join(filter(None, texts))


def _result_text(block: Object, path: str, definitions: dict[str, str]) -> str:
    text = _joined(block.get("content"), f"{path}.content", definitions)
    return (
        f"Error: {text}" if block.get("is_error") is True and not text.startswith("Error") else text
    )


def _block_text(block: Object, path: str, definitions: dict[str, str] | None = None) -> str:
    """A block as text for the model, "" for what has no meaning here. `definitions` are the
    deferred tools' by name."""
    kind = field(block, "type", str, f"{path}.", required=True)
    if kind == "text":
        return field(block, "text", str, f"{path}.", required=True)
    if kind == "image":
        if field(block, "source", dict, f"{path}.", required=True).get("type") == "file":
            raise WireError(400, f"{path}.source: files are not supported by this server")
        return IMAGE_NOTE
    if kind in ("document", "search_result"):
        about = [field(block, key, str, f"{path}.") for key in ("title", "context")]
        if kind == "document":
            return "\n".join(filter(None, [*about, _document_text(block, path)]))
        origin = field(block, "source", str, f"{path}.")
        return "\n".join(
            filter(None, [*about, origin, _joined(block.get("content"), f"{path}.content")])
        )
    if kind == "tool_reference":
        name = field(block, "tool_name", str, f"{path}.", required=True)
        return (definitions or {}).get(name, name)
    if kind == "compaction":
        return field(block, "content", str, f"{path}.", default="")
    if kind == "container_upload":
        raise WireError(400, f"{path}: files are not supported by this server")
    if kind != "redacted_thinking":
        log.info("%s: left out a block of type %s", path, kind)
    return ""


def _document_text(block: Object, path: str) -> str:
    source = field(block, "source", dict, f"{path}.", required=True)
    if source.get("type") == "text":
        return field(source, "data", str, f"{path}.source.", required=True)
    if source.get("type") == "content":
        return _joined(source.get("content"), f"{path}.source.content")
    raise WireError(
        400, f"{path}.source: only documents of text are supported by this server; send its text"
    )


class AnthropicMessages(Reply):
    """POST /v1/messages. Blocks come strictly one after the other, so `_content` is what was
    streamed and what `whole` returns. `request_id` goes into an error event."""

    dialect = "anthropic"
    framing = "events"
    # Seconds without a real event: some clients give up after 300, and do not count pings
    LULL = 150.0

    def __init__(self, body: Object, request_id: str = ""):
        self.request = _anthropic_request(body)
        self.stream = field(body, "stream", bool, default=False)
        self.request_id = request_id
        # "updates" are notes between calls, for which local models have no place: reasoning is not
        # shown for them either.
        self._hides_thinking = (body.get("thinking") or {}).get("display") in ("omitted", "updates")
        self._content: list[Object] = []
        self._open = ""  # the type of the block being written
        self._blank = ""  # leading blanks of a text that may turn out to be nothing else
        self._message: Object = {}

    def open(self, generation: Any) -> list[Object]:
        self._message = {
            "id": f"msg_{generation.id}",
            "type": "message",
            "role": "assistant",
            "model": self.request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": _anthropic_usage(Usage(generation.prompt_tokens, generation.cached_tokens, 1)),
        }
        return [{"type": "message_start", "message": self._message}]

    def event(self, event: Event) -> list[Object]:
        match event:
            case Thinking(text):
                return self._thinking(text)
            case Text(text):
                return self._text(text)
            case ToolStart(id, name):
                return [
                    *self._start({"type": "tool_use", "id": id, "name": name, "input": {}}),
                    self._delta("input_json_delta", partial_json=""),
                ]
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
        out = (
            []
            if self._open == "thinking"
            else self._start({"type": "thinking", "thinking": "", "signature": ""})
        )
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
        out = (
            self._stop()
            if self._content
            else [*self._start({"type": "text", "text": ""}), *self._stop()]
        )
        ending = {
            "stop_reason": _STOP_REASONS[done.reason],
            "stop_sequence": done.stop_sequence,
            "stop_details": None,
        }
        usage = _anthropic_usage(done.usage)
        created = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
        self._message = {
            **self._message,
            **ending,
            "content": self._content,
            "usage": {**usage, "cache_creation": created, "service_tier": "standard"},
        }
        return [
            *out,
            {"type": "message_delta", "delta": ending, "usage": usage},
            {"type": "message_stop"},
        ]

    def _start(self, block: Object) -> list[Object]:
        out = self._stop()
        self._blank, self._open = "", block["type"]
        self._content.append(dict(block))
        out.append(
            {"type": "content_block_start", "index": len(self._content) - 1, "content_block": block}
        )
        return out + (self.ping() if len(self._content) == 1 else [])

    def _delta(self, kind: str, **piece: str) -> Object:
        return {
            "type": "content_block_delta",
            "index": len(self._content) - 1,
            "delta": {"type": kind, **piece},
        }

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
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.thinking_tokens},
    }


def anthropic_error(error: Exception, request_id: str) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception. What will fail again is 4xx or tells
    clients not to retry."""
    headers: dict[str, str] = {}
    match error:
        case WireError():
            status, message, headers = error.status, error.message, error.headers
        case ModelNotFound():
            status, message = (
                404,
                f"model: {error.model} (installed: {', '.join(error.installed) or 'none'})",
            )
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
    return (
        status,
        headers,
        {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id},
    )
