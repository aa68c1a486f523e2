"""OpenAI's responses: https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from _mlx_server.inference.protocol import (
    Done,
    Event,
    Text,
    Thinking,
    ToolEnd,
    ToolInput,
    ToolStart,
)
from _mlx_server.wire.conversation import CHAT_ROLES, Turn, require_content
from _mlx_server.wire.fields import Object, WireError, field, items
from _mlx_server.wire.openai import fill_conversation, openai_error, openai_request, openai_text
from _mlx_server.wire.reply import Reply, token_objects
from _mlx_server.wire.tools import call_arguments

log = logging.getLogger("mlx_server")


# What a server would have to remember
_NOT_KEPT = ("previous_response_id", "conversation", "prompt", "background")
# What their ids begin with
_ITEMS = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}
# By the item's type: the key of its parts, a part, what its events say beside it, and the names of
# those
_PARTS = {
    "reasoning": (
        "summary",
        {"type": "summary_text"},
        {"summary_index": 0},
        "reasoning_summary_part",
        "reasoning_summary_text",
    ),
    "message": (
        "content",
        {"type": "output_text", "annotations": [], "logprobs": []},
        {"content_index": 0, "logprobs": []},
        "content_part",
        "output_text",
    ),
}
# Of a custom tool
_FREE = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class OpenAIResponses(Reply):
    """POST /v1/responses, without a memory of earlier ones. Items come strictly one after the
    other, so `_output` is what was streamed and what `whole` returns. Reasoning goes by the name of
    a summary, which is what clients show and send back."""

    dialect = "openai"
    framing = "events"

    def __init__(self, body: Object):
        self.request = openai_request(body, "max_output_tokens")
        self.stream = field(body, "stream", bool, default=False)
        for key in _NOT_KEPT:
            if body.get(key):
                raise WireError(
                    400,
                    f"{key}: not supported by this server; send the whole conversation as input",
                )
        # (namespace, name) by the name that the model sees
        self._spaces: dict[str, tuple[str, str]] = {}
        tools = self._flat_tools(items(body, "tools", dict))
        self._custom = {tool["name"] for tool in tools if tool.get("parameters") is _FREE}
        if "message.output_text.logprobs" in items(body, "include", str):
            self.request.logprobs = field(body, "top_logprobs", int, default=0, low=0, high=20)
        turns = [
            Turn("system", field(body, "instructions", str, default="")),
            *require_content(_responses_turns(body), "input"),
        ]
        effort = field(field(body, "reasoning", dict, default={}), "effort", str, "reasoning.")
        form = field(field(body, "text", dict, default={}), "format", dict, "text.", default={})
        fill_conversation(self.request, body, tools, turns, effort, form, "text.format.")
        self._response: Object = {
            "object": "response",
            "model": self.request.model,
            "status": "in_progress",
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "usage": None,
            "tools": [
                {"type": "function", "strict": None, **tool["function"]}
                for tool in self.request.tools
            ],
            "tool_choice": body.get("tool_choice") or "auto",
            "parallel_tool_calls": self.request.parallel_tool_calls,
        }
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
                kind, key = (
                    ("custom_tool_call", "input")
                    if called in self._custom
                    else ("function_call", "arguments")
                )
                return self._start(
                    kind,
                    call_id=id,
                    name=name,
                    **{key: ""},
                    **({"namespace": space} if space else {}),
                )
            case ToolInput(piece) if self._open == "function_call":
                self._output[-1]["arguments"] += piece
                return [self._event("function_call_arguments.delta", **self._place(), delta=piece)]
            case ToolEnd(arguments, cut):
                out = []
                if self._open == "custom_tool_call":
                    given = arguments.get("input", "")
                    self._output[-1]["input"] = text = (
                        given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                    )
                    out = [self._event("custom_tool_call_input.delta", **self._place(), delta=text)]
                return [*out, *self._stop("incomplete" if cut else "completed")]
            case Done():
                return self._done(event)
        return []

    def ping(self, lull: float = 0.0) -> list[Object]:
        return [self._event("in_progress", response=self._response)]

    def failure(self, error: Exception) -> list[Object]:
        said = {"code": "server_error", "message": openai_error(error)[2]["error"]["message"]}
        return [
            self._event("failed", response={**self._response, "status": "failed", "error": said})
        ]

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
            space = field(tool, "name", str, at, required=True)
            for inner in items(tool, "tools", dict, at):
                name = field(inner, "name", str, f"{at}tools.", required=True)
                self._spaces[_in_space(space, name)] = (space, name)
                flat.append({**_as_function(inner, f"{at}tools."), "name": _in_space(space, name)})
        return flat

    def _say(self, kind: str, text: str, logprobs: list[Object] | None = None) -> list[Object]:
        key, part, _, part_name, text_name = _PARTS[kind]
        out = []
        if self._open != kind:
            out = self._start(
                kind, **{key: []}, **({"role": "assistant"} if kind == "message" else {})
            )
            self._output[-1][key] = [{**part, "text": ""}]
            out.append(
                self._event(f"{part_name}.added", **self._place(), part={**part, "text": ""})
            )
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
        return [
            *out,
            self._event(
                "output_item.added", output_index=len(self._output) - 1, item=dict(self._output[-1])
            ),
        ]

    def _stop(self, status: str = "completed") -> list[Object]:
        if not self._open:
            return []
        item, where = self._output[-1], self._place()
        item["status"] = status
        if self._open in _PARTS:
            key, _, _, part_name, text_name = _PARTS[self._open]
            part = item[key][0]
            said = {name: part[name] for name in ("text", "logprobs") if name in part}
            out = [
                self._event(f"{text_name}.done", **where | said),
                self._event(f"{part_name}.done", **where, part=part),
            ]
        elif self._open == "custom_tool_call":
            out = [self._event("custom_tool_call_input.done", **where, input=item["input"])]
        else:
            out = [
                self._event(
                    "function_call_arguments.done",
                    **where,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            ]
        self._open = ""
        return [
            *out,
            self._event("output_item.done", output_index=len(self._output) - 1, item=item),
        ]

    def _done(self, done: Done) -> list[Object]:
        status = "incomplete" if done.reason in ("length", "context") else "completed"
        out, usage = self._stop(status), done.usage
        self._response |= {
            "status": status,
            "output": self._output,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "output_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
            },
        }
        return [*out, self._event(status, response=self._response)]

    def _place(self) -> Object:
        """Where in the output an event belongs."""
        where = _PARTS[self._open][2] if self._open in _PARTS else {}
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, **where}

    def _event(self, name: str, /, **fields: Any) -> Object:
        self._count += 1
        return {"type": f"response.{name}", "sequence_number": self._count - 1, **fields}


def _as_function(tool: Object, at: str) -> Object:
    """A custom tool, whose input is free text, as a function of one string; others as they are. A
    grammar that the text is to follow is told, not enforced."""
    if tool.get("type") != "custom":
        return tool
    form = field(tool, "format", dict, at, default={})
    told = [
        field(tool, "description", str, at, default=""),
        field(form, "definition", str, f"{at}format.", default=""),
    ]
    name = field(tool, "name", str, at, required=True)
    return {
        "type": "function",
        "name": name,
        "description": "\n\n".join(filter(None, told)),
        "parameters": _FREE,
    }


def _in_space(space: str | None, name: str) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{space}__{name}" if space else name


def _item_call_id(item: Object, kind: str, at: str) -> str:
    """The id of the call that an item is or answers; those of the local shell may have no
    `call_id`."""
    own = kind.startswith("local_shell_call") and item.get("call_id") is None
    return field(item, "id" if own else "call_id", str, at, required=True)


def _responses_turns(body: Object) -> list[Turn]:
    """The turns of an input: a text, or items of which one assistant's turn may have several."""
    if isinstance(body.get("input"), str):
        return [Turn("user", body["input"])]
    turns = []
    for number, item in enumerate(items(body, "input", dict, required=True)):
        at = f"input.{number}."
        kind = field(item, "type", str, at, default="message")
        if kind == "message":
            role = field(item, "role", str, at, required=True)
            turns.append(Turn(CHAT_ROLES.get(role, "user"), openai_text(item, at)))
        elif kind in ("function_call", "custom_tool_call"):
            id, name = (field(item, key, str, at, required=True) for key in ("call_id", "name"))
            arguments = (
                call_arguments(item.get("arguments"))
                if kind == "function_call"
                else {"input": field(item, "input", str, at, default="")}
            )
            turns.append(
                Turn(
                    "assistant",
                    calls=[(id, _in_space(field(item, "namespace", str, at), name), arguments)],
                )
            )
        elif kind == "local_shell_call":
            action = field(item, "action", dict, at, required=True)
            turns.append(
                Turn("assistant", calls=[(_item_call_id(item, kind, at), "local_shell", action)])
            )
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            id = _item_call_id(item, kind, at)
            turns.append(Turn("tool", openai_text(item, at, "output"), call_id=id))
        elif kind == "reasoning":
            turns.append(
                Turn(
                    "assistant", reasoning=openai_text(item, at) or openai_text(item, at, "summary")
                )
            )
        elif kind == "item_reference":
            raise WireError(
                400, f"{at}type: '{kind}' is not supported by this server; send the item"
            )
        else:
            log.info("%s left out an item of type %s", at, kind)
    return turns
