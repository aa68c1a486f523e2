"""Ollama's chat and generate:
https://github.com/ollama/ollama/blob/main/docs/api.md and api/types.go beside it"""

from __future__ import annotations

import functools
import hashlib
import json
import logging

from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.protocol import (
    Done,
    Event,
    Request,
    Text,
    Thinking,
    ToolEnd,
    ToolStart,
)
from _mlx_server.wire.chat_messages import chat_turns
from _mlx_server.wire.conversation import Turn, ask_for_json, canonical
from _mlx_server.wire.errors import ollama_error
from _mlx_server.wire.fields import Object, WireError, field, items, now
from _mlx_server.wire.images import Images
from _mlx_server.wire.ollama_request import (
    image_texts,
    ollama_max_tokens,
    ollama_model_name,
    ollama_options,
    ollama_sampling,
    ollama_text,
    ollama_thinking,
    parse_keep_alive,
)
from _mlx_server.wire.reply import Frames, Reply, token_objects
from _mlx_server.wire.tools import function_tools

log = logging.getLogger("mlx_server")

# Characters of text in one line: even escaped they stay below 128 KiB, which is all that some
# clients can read in a line.
_MAX_TEXT = 8_000


class _OllamaReply(Reply):
    """What chat and generate have in common: all but the field that the text stands in.

    Tool calls are sent whole. Counts and durations are only in the last object, since some clients
    add them up."""

    dialect = "ollama"
    framing = "lines"
    purpose: str  # what a model must be able to do, in the words of the error
    nameless: tuple[int, str]  # status and message of the error if no model is named
    # Whether the last object has the tokens that a later request can continue from
    _sends_context = False

    def __init__(self, body: Object):
        if not isinstance(body, dict):
            raise WireError(400, "Input should be an object")
        top_logprobs = field(body, "top_logprobs", int, default=0)
        if not 0 <= top_logprobs <= 20:
            raise WireError(400, "top_logprobs must be between 0 and 20")
        if field(body, "_debug_render_only", bool, default=False):
            raise WireError(400, "_debug_render_only is not supported by this server")
        name = ollama_model_name(body, *self.nameless)
        self.stream = field(body, "stream", bool, default=True)
        options = ollama_options(body)
        thinking, effort = ollama_thinking(body)
        self.request = Request(
            name,
            sampling=ollama_sampling(options),
            stop=[text for text in options["stop"] if text],
            max_tokens=ollama_max_tokens(options),
            thinking=thinking,
            effort=effort,
            logprobs=top_logprobs if field(body, "logprobs", bool, default=False) else None,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
            speculate=options.get("draft_num_predict") != 0,
        )
        self.bound_logprobs()
        self._format = _checked_format(body)
        self._text = self._thoughts = ""
        self._tokens: list[Object] = []
        self._calling: ToolStart | None = None  # the call being written
        self._calls: list[Object] = []
        self._ending: Object = {"done_reason": "unload"}

    def check(self, model: LocalModel) -> None:
        if "completion" not in model.capabilities:
            raise WireError(400, f'"{self.request.model}" does not support {self.purpose}')
        if self.request.thinking and "thinking" not in model.capabilities:
            raise WireError(400, f'"{self.request.model}" does not support thinking')

    def event(self, event: Event) -> Frames:
        match event:
            case Thinking(text):
                self._thoughts += text
                return [self._object("", thinking=piece) for piece in _pieces(text)]
            case Text(text, tokens):
                logprobs = token_objects(tokens)
                self._text += text
                if not self.stream:
                    self._tokens += logprobs
                    self.hold_logprobs(tokens)
                first, *others = [self._object(piece) for piece in _pieces(text)]
                return [first | _logprobs_field(logprobs), *others]
            case ToolStart():
                self._calling = event
            case ToolEnd(arguments, cut) if self._calling:
                return self._end_call(self._calling, arguments, cut)
            case Done():
                self._ending = _ending(event, self._sends_context)
                return [self._object("", done=True) | self._ending]
        return []

    def ping(self, lull: float = 0.0) -> Frames:
        return [self._object("")]

    def failure(self, error: Exception) -> Frames:
        _, _, body = ollama_error(error)
        return [body]

    def whole(self) -> Object:
        body = self._object(self._text, done=True, thinking=self._thoughts, tool_calls=self._calls)
        return body | _logprobs_field(self._tokens) | self._ending

    def _end_call(self, call: ToolStart, arguments: Object, cut: bool) -> Frames:
        if cut:
            log.info("a call of %s was cut off and left out", call.name)
            return []
        # Made from the engine's id, so that both name the same call
        id = f"call_{hashlib.sha256(call.id.encode()).hexdigest()[:8]}"
        function = {"index": len(self._calls), "name": call.name, "arguments": arguments}
        self._calls.append({"id": id, "function": function})
        return [self._object("", tool_calls=self._calls[-1:])]

    def _object(self, text: str, done: bool = False, **more: str | list[Object]) -> Object:
        """One object of the answer, without those of the other fields that are empty."""
        fields = self._text_fields(text, {key: value for key, value in more.items() if value})
        return {"model": self.request.model, "created_at": now(), **fields, "done": done}

    def _text_fields(self, text: str, more: Object) -> Object:
        """The fields that carry text, thinking and calls."""
        raise NotImplementedError

    def _only_load(self) -> None:
        """Makes the answer one object that says that the model was loaded or unloaded. For bodies
        without anything to generate from."""
        self.stream = False
        self.unload = self.request.keep_alive == 0

    def _ask_for_format(self) -> None:
        if self._format:
            ask_for_json(self.request, None if isinstance(self._format, str) else self._format)


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
        images = Images()
        turns = chat_turns(messages, functools.partial(ollama_text, images=images))
        conversation, self.request.images = canonical(turns), images.files
        self.request.messages = conversation or [{"role": "user", "content": ""}]
        self._ask_for_format()

    def _text_fields(self, text: str, more: Object) -> Object:
        return {"message": {"role": "assistant", "content": text, **more}}


class OllamaGenerate(_OllamaReply):
    """POST /api/generate."""

    purpose = "generate"
    nameless = 404, "model '' not found"

    def __init__(self, body: Object):
        super().__init__(body)
        prompt, system, template, suffix = (
            field(body, key, str, default="") for key in ("prompt", "system", "template", "suffix")
        )
        raw = field(body, "raw", bool, default=False)
        images = Images()
        shown = image_texts(body, images=images)
        self.request.context = items(body, "context", int)
        self._sends_context = not raw
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
        self.request.images = images.files
        user = Turn("user", "\n".join([*shown, prompt]))
        self.request.messages = canonical([Turn("system", system), user])
        self._ask_for_format()

    def check(self, model: LocalModel) -> None:
        super().check(model)
        if self.request.suffix and "insert" not in model.capabilities:
            raise WireError(400, f"{self.request.model} does not support insert")

    def hide_prompt(self) -> None:
        self._sends_context = False

    def _text_fields(self, text: str, more: Object) -> Object:
        return {"response": text, **more}


def _checked_format(body: Object) -> Object | str | None:
    """ "json", a JSON schema, or None: https://docs.ollama.com/capabilities/structured-outputs"""
    form = body.get("format") or None
    if form is None or form == "json" or isinstance(form, dict):
        return form
    raise WireError(
        400,
        f"invalid format: {json.dumps(form, ensure_ascii=False)}; "
        'expected "json" or a valid JSON Schema object',
    )


def _pieces(text: str) -> list[str]:
    return [text[start : start + _MAX_TEXT] for start in range(0, len(text), _MAX_TEXT)]


def _logprobs_field(tokens: list[Object]) -> Object:
    return {"logprobs": tokens} if tokens else {}


def _ending(done: Done, sends_context: bool) -> Object:
    """The fields of the last object. Durations are in nanoseconds."""
    if done.reason == "load":
        return {"done_reason": "load"}
    usage = done.usage
    seconds = {
        "total": usage.total_seconds,
        "load": usage.load_seconds,
        "prompt_eval": usage.prefill_seconds,
        "eval": usage.decode_seconds,
    }
    return {
        "done_reason": "length" if done.reason in ("length", "context") else "stop",
        # Those of images mean nothing without them
        **({"context": [one for one in done.tokens if one >= 0]} if sends_context else {}),
        **{f"{name}_duration": int(value * 1e9) for name, value in seconds.items()},
        "prompt_eval_count": usage.prompt_tokens,
        "eval_count": usage.completion_tokens,
    }
