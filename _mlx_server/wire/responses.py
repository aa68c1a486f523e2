"""OpenAI's responses: https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.protocol import (
    Done,
    Event,
    Request,
    Text,
    Thinking,
    ToolEnd,
    ToolInput,
    ToolStart,
    Usage,
)
from _mlx_server.wire.conversation import Turn, require_content
from _mlx_server.wire.errors import openai_error
from _mlx_server.wire.fields import Object, WireError, field, items, nested
from _mlx_server.wire.images import Images
from _mlx_server.wire.openai_request import fill_conversation, openai_request
from _mlx_server.wire.reply import Accepted, Frames, Reply, token_objects
from _mlx_server.wire.responses_request import responses_tools, responses_turns

# Fields that need a server which remembers earlier requests
_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
MAX_NAME = 512  # characters of what is told of a tool choice
_ID_PREFIXES = {
    "reasoning": "rs",
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
}


@dataclass(frozen=True)
class _TextItem:
    """How an item with text is written. `key` holds the list of its parts, of which there is always
    one; `part` is that part without its text. All events of the part carry `event_fields`. The
    types of the events begin with `part_event` and `text_event`."""

    key: str
    part: Object
    event_fields: Object
    part_event: str
    text_event: str


_TEXT_ITEMS = {
    "reasoning": _TextItem(
        key="summary",
        part={"type": "summary_text"},
        event_fields={"summary_index": 0},
        part_event="reasoning_summary_part",
        text_event="reasoning_summary_text",
    ),
    "message": _TextItem(
        key="content",
        part={"type": "output_text", "annotations": [], "logprobs": []},
        event_fields={"content_index": 0, "logprobs": []},
        part_event="content_part",
        text_event="output_text",
    ),
}


class OpenAIResponses(Reply):
    """POST /v1/responses, without earlier responses. Items come strictly one after the other, so
    `_output` is both what was streamed and what `whole` returns. Reasoning is sent as a summary,
    which clients show and send back.

    Streams: https://platform.openai.com/docs/api-reference/responses-streaming"""

    dialect = "openai"
    framing = "events"

    def __init__(self, body: Object):
        self.request = openai_request(body, "max_output_tokens")
        self.stream = field(body, "stream", bool, default=False)
        for key in _STATEFUL:
            if body.get(key):
                raise WireError(
                    400,
                    f"{key}: not supported by this server; send the whole conversation as input",
                )
        self._tools = responses_tools(items(body, "tools", dict))
        if "message.output_text.logprobs" in items(body, "include", str):
            self.request.logprobs = field(body, "top_logprobs", int, default=0, low=0, high=20)
            self.bound_logprobs()
        images = Images()
        turns = [
            Turn("system", field(body, "instructions", str, default="")),
            *require_content(responses_turns(body, images), "input"),
        ]
        self.request.images = images.files
        reasoning = field(body, "reasoning", dict, default={})
        effort = field(reasoning, "effort", str, "reasoning")
        text = field(body, "text", dict, default={})
        output_format = field(text, "format", dict, "text", default={})
        fill_conversation(
            self.request,
            body,
            self._tools.tools,
            turns,
            effort=effort,
            output_format=output_format,
            format_path="text.format",
        )
        self._response = _new_response(self.request, body)
        self._output: list[Object] = []
        self._item_type = ""  # of the item being written, "" between two items
        self._event_count = 0

    def open(self, generation: Accepted) -> Frames:
        self._response |= {"id": f"resp_{generation.id}", "created_at": int(time.time())}
        return [self._event("created", response=self._response), *self.ping()]

    def event(self, event: Event) -> Frames:
        match event:
            case Thinking(text):
                return self._write_text("reasoning", text)
            case Text(text, tokens):
                self.hold_logprobs(tokens)
                return self._write_text("message", text, token_objects(tokens))
            case ToolStart(id, name):
                return self._start_call(id, name)
            case ToolInput(piece) if self._item_type == "function_call":
                self._output[-1]["arguments"] += piece
                return [self._item_event("function_call_arguments.delta", delta=piece)]
            case ToolEnd(arguments, cut):
                frames: Frames = []
                if self._item_type == "custom_tool_call":
                    text = _free_text(arguments)
                    self._output[-1]["input"] = text
                    frames.append(self._item_event("custom_tool_call_input.delta", delta=text))
                return frames + self._end_item("incomplete" if cut else "completed")
            case Done():
                return self._end(event)
        return []

    def ping(self, lull: float = 0.0) -> Frames:
        return [self._event("in_progress", response=self._response)]

    def failure(self, error: Exception) -> Frames:
        _, _, body = openai_error(error)
        failed = {"code": "server_error", "message": body["error"]["message"]}
        response = {**self._response, "status": "failed", "error": failed}
        return [self._event("failed", response=response)]

    def whole(self) -> Object:
        return self._response

    def _write_text(
        self, item_type: str, text: str, logprobs: list[Object] | None = None
    ) -> Frames:
        """Adds text to the open item, which is begun if it has another type."""
        form = _TEXT_ITEMS[item_type]
        frames: Frames = []
        if self._item_type != item_type:
            fields: Object = {form.key: []}
            if item_type == "message":
                fields["role"] = "assistant"
            frames = self._start_item(item_type, **fields)
            self._output[-1][form.key] = [_empty(form)]
            frames.append(self._item_event(f"{form.part_event}.added", part=_empty(form)))
        part = self._output[-1][form.key][0]
        part["text"] += text
        delta = self._item_event(f"{form.text_event}.delta", delta=text)
        if logprobs:
            part["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        return [*frames, delta]

    def _start_call(self, id: str, tool_name: str) -> Frames:
        """Begins a call of the tool that the model knows as `tool_name`."""
        namespace, name = self._tools.namespaces.get(tool_name, ("", tool_name))
        custom = tool_name in self._tools.custom
        fields = {"call_id": id, "name": name, "input" if custom else "arguments": ""}
        if namespace:
            fields["namespace"] = namespace
        return self._start_item("custom_tool_call" if custom else "function_call", **fields)

    def _start_item(self, item_type: str, **fields: Any) -> Frames:
        """Ends the open item and begins another."""
        frames = self._end_item()
        self._item_type = item_type
        index = len(self._output)
        id = f"{_ID_PREFIXES[item_type]}_{self._response['id'].removeprefix('resp_')}{index:02}"
        item = {"id": id, "type": item_type, "status": "in_progress", **fields}
        self._output.append(item)
        added = self._event("output_item.added", output_index=index, item=dict(item))
        return [*frames, added]

    def _end_item(self, status: str = "completed") -> Frames:
        if not self._item_type:
            return []
        item = self._output[-1]
        item["status"] = status
        frames = self._last_events(item)
        self._item_type = ""
        done = self._event("output_item.done", output_index=len(self._output) - 1, item=item)
        return [*frames, done]

    def _last_events(self, item: Object) -> Frames:
        """The events that repeat the whole content of the open item."""
        if self._item_type == "custom_tool_call":
            return [self._item_event("custom_tool_call_input.done", input=item["input"])]
        if self._item_type == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            return [self._item_event("function_call_arguments.done", **call)]
        form = _TEXT_ITEMS[self._item_type]
        part = item[form.key][0]
        content = {key: part[key] for key in ("text", "logprobs") if key in part}
        return [
            self._item_event(f"{form.text_event}.done", **content),
            self._item_event(f"{form.part_event}.done", part=part),
        ]

    def _end(self, done: Done) -> Frames:
        """Ends the response."""
        incomplete = done.reason in ("length", "context")
        status = "incomplete" if incomplete else "completed"
        frames = self._end_item(status)
        self._response |= {
            "status": status,
            "output": self._output,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "usage": _usage_object(done.usage),
        }
        return [*frames, self._event(status, response=self._response)]

    def _item_event(self, name: str, /, **fields: Any) -> Object:
        """An event about the open item."""
        form = _TEXT_ITEMS.get(self._item_type)
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(name, **place | (form.event_fields if form else {}) | fields)

    def _event(self, name: str, /, **fields: Any) -> Object:
        event = {"type": f"response.{name}", "sequence_number": self._event_count, **fields}
        self._event_count += 1
        return event


def _empty(form: _TextItem) -> Object:
    """A part without text, whose lists are its own."""
    return {**copy.deepcopy(form.part), "text": ""}


def _new_response(request: Request, body: Object) -> Object:
    """The response object before anything is generated. Several events hold it: what of the body is
    in it is also in the prompt, which bounds it."""
    return {
        "object": "response",
        "model": request.model,
        "status": "in_progress",
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "usage": None,
        "tools": [
            {"type": "function", "strict": None, **tool["function"]}
            for tool in (request.tools if request.tool_choice != "none" else [])
        ],
        "tool_choice": _told_choice(body.get("tool_choice") or "auto"),
        "parallel_tool_calls": request.parallel_tool_calls,
    }


def _told_choice(choice: Any) -> Any:
    """A tool choice without what means nothing here, and without the tools that `tools` tells."""
    if not isinstance(choice, dict):
        return choice
    inner, _ = nested(choice, str(choice.get("type")), "")
    told = {key: {**inner, **choice}.get(key) for key in ("type", "name", "mode")}
    told = {key: text[:MAX_NAME] for key, text in told.items() if isinstance(text, str)}
    return {**told, "tools": []} if told.get("type") == "allowed_tools" else told


def _free_text(arguments: Object) -> str:
    """The input of a custom tool, which the model gave as the argument of a function."""
    value = arguments.get("input", "")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _usage_object(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
    }
