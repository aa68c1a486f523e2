"""OpenAI's chat completions, completions and embeddings:
https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

import base64
import itertools
import logging
import re
import struct
import time
from dataclasses import replace
from typing import Any

from _mlx_server.inference.protocol import (
    Done,
    Event,
    ModelNotFound,
    PromptTooLong,
    Request,
    Sampling,
    Text,
    Thinking,
    Token,
    ToolInput,
    ToolStart,
    Usage,
)
from _mlx_server.wire.anthropic import anthropic_error
from _mlx_server.wire.conversation import (
    IMAGE_NOTE,
    Turn,
    ask_for_json,
    canonical,
    chat_turns,
    require_content,
)
from _mlx_server.wire.fields import (
    Object,
    WireError,
    content_blocks,
    field,
    is_type,
    items,
    model_name,
    nested,
)
from _mlx_server.wire.reply import Embeddings, Reply, token_objects
from _mlx_server.wire.tools import any_strict, forced_choice, function_tools

log = logging.getLogger("mlx_server")


# Otherwise "stop"
_FINISH_REASONS = {"length": "length", "context": "length", "tool_calls": "tool_calls"}
_MOST_CHOICES = 32  # of one request
_MOST_TEXTS = 2048  # to embed in one request, as OpenAI has it
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def openai_request(body: Object, *limits: str) -> Request:
    """What all three bodies have in common. `limits` are the names of the bound on the answer's
    tokens; -1 is none.

    Raises WireError 400 with the path of what is wrong. Unknown keys are ignored, and so is all
    that only steers OpenAI's own caches, storage and billing."""
    model = model_name(body)
    bounds = [field(body, key, int, low=-1) for key in limits]
    bound = next((bound for bound in bounds if bound is not None), None)
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else items(body, "stop", str)
    top_k = field(body, "top_k", int, low=-1)
    return Request(
        model,
        stop=[text for text in stop if text],
        max_tokens=None if bound == -1 else bound,
        sampling=Sampling(
            temperature=field(body, "temperature", float, low=0, high=2),
            top_p=field(body, "top_p", float, low=0, high=1),
            top_k=None if top_k is None else max(0, top_k),
            min_p=field(body, "min_p", float, low=0, high=1),
            repetition_penalty=field(body, "repetition_penalty", float, low=0),
            presence_penalty=field(body, "presence_penalty", float, low=-2, high=2),
            frequency_penalty=field(body, "frequency_penalty", float, low=-2, high=2),
            seed=field(body, "seed", int),
            logit_bias=_logit_bias(field(body, "logit_bias", dict, default={})),
        ),
    )


def _logit_bias(given: Object) -> dict[int, float] | None:
    for key in given:
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise WireError(400, f"logit_bias: '{key}' should be the id of a token")
    return {
        int(key): field(given, key, float, "logit_bias.", default=0, low=-100, high=100)
        for key in given
    } or None


def fill_conversation(
    request: Request,
    body: Object,
    tools: list[Object],
    turns: list[Turn],
    effort: str | None,
    form: Object,
    path: str,
) -> None:
    """Fills in what belongs to a conversation; `form` is the demanded output format, found at
    `path`."""
    request.messages = canonical(turns)
    request.tool_choice, request.tools = _openai_tool_choice(body, function_tools(tools))
    request.strict = any_strict(tools)
    request.parallel_tool_calls = field(body, "parallel_tool_calls", bool, default=True)
    asked = field(
        field(body, "chat_template_kwargs", dict, default={}),
        "enable_thinking",
        bool,
        "chat_template_kwargs.",
    )
    request.thinking = effort != "none" if asked is None and effort else asked
    request.effort = effort if effort != "none" else None
    kind = field(form, "type", str, path, default="text")
    if kind == "json_schema":
        inner, path = nested(form, "json_schema", path)
        ask_for_json(request, field(inner, "schema", dict, path, default={}))
    elif kind == "json_object":
        ask_for_json(request, None)
    elif kind != "text":
        raise WireError(400, f"{path}type: Input should be 'text', 'json_object' or 'json_schema'")


def _openai_tool_choice(body: Object, tools: list[Object]) -> tuple[str, list[Object]]:
    """`Request.tool_choice`, and the tools there are to choose from."""
    given = body.get("tool_choice")
    choice = (
        {"type": given} if isinstance(given, str) else field(body, "tool_choice", dict, default={})
    )
    kind, name = field(choice, "type", str, "tool_choice.", default="auto"), None
    inner, path = nested(choice, kind, "tool_choice.")
    if kind == "allowed_tools":
        allowed = [
            nested(tool, "function", path)[0].get("name")
            for tool in items(inner, "tools", dict, path, required=True)
        ]
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        kind = field(inner, "mode", str, path, default="auto")
    elif kind in ("function", "custom"):
        name = field(inner, "name", str, path, required=True)
    if kind in ("required", "function", "custom"):
        return forced_choice(kind, name, tools, path), tools
    if kind not in ("auto", "none"):
        raise WireError(
            400,
            "tool_choice: Input should be 'none', 'auto', 'required', a function or allowed tools",
        )
    return kind, tools


def openai_text(message: Object, path: str, key: str = "content") -> str:
    """The text of a message's content, or of a tool's output: a string or parts of any of the
    APIs."""
    content = message.get(key)
    parts = [] if content is None else content_blocks(content, f"{path}{key}")
    return "\n".join(
        filter(
            None, (_part_text(part, f"{path}{key}.{number}.") for number, part in enumerate(parts))
        )
    )


def _part_text(part: Object, path: str) -> str:
    kind = field(part, "type", str, path, required=True)
    if kind in ("text", "input_text", "output_text", "summary_text", "reasoning_text"):
        return field(part, "text", str, path, required=True)
    if kind == "refusal":
        return field(part, "refusal", str, path, default="")
    if kind in ("image_url", "input_image"):
        return IMAGE_NOTE
    if kind in ("input_audio", "file", "input_file"):
        raise WireError(400, f"{path}type: '{kind}' is not supported by this server; send its text")
    log.info("%s left out a part of type %s", path, kind)
    return ""


class _Completions(Reply):
    """What the two have in common. Choices come one after the other: `Done` ends one, the last one
    ends the answer."""

    dialect = "openai"
    framing = "data"
    prefix: str  # of the answer's id
    kinds: tuple[str, str]  # what the object is called when it comes whole, and in pieces

    def __init__(self, body: Object, *limits: str):
        self.request = openai_request(body, *limits)
        self.stream = field(body, "stream", bool, default=False)
        options = field(body, "stream_options", dict, default={})
        self._counts = field(options, "include_usage", bool, "stream_options.", default=False)
        self._n = field(body, "n", int, default=1, low=1, high=_MOST_CHOICES)
        self._prompts: list[str | list[int] | None] = [None]
        self._head: Object = {}
        self._choices: list[Object] = []  # those that have ended
        self._usages: list[Usage] = []
        self._begin()

    @property
    def requests(self) -> list[Request]:
        """One for each choice: all those of a prompt, then those of the next. Each has a seed of
        its own."""

        def seed(number: int) -> Sampling:
            sampling = self.request.sampling
            return replace(sampling, seed=None if sampling.seed is None else sampling.seed + number)

        return [
            replace(self.request, prompt=prompt, sampling=seed(number))
            for prompt in self._prompts
            for number in range(self._n)
        ]

    def open(self, generation: Any) -> list[Object]:
        self._head = {
            "id": f"{self.prefix}-{generation.id}",
            "created": int(time.time()),
            "model": self.request.model,
        }
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
        return {
            **self._head,
            "object": self.kinds[0],
            "choices": self._choices,
            "usage": self._usage(),
        }

    def _begin(self) -> None:
        """Before each choice."""
        self._text = ""
        self._tokens: list[Token] = []

    def _done(self, done: Done) -> list[Object | str]:
        finish = _FINISH_REASONS.get(done.reason, "stop")
        out: list[Object | str] = [self._chunk(self._piece("", []), finish)]
        self._choices.append(
            {"index": len(self._choices), **self._choice(), "finish_reason": finish}
        )
        self._usages.append(done.usage)
        self._begin()
        if len(self._choices) < len(self._prompts) * self._n:
            return out
        usage = [{**out[0], "choices": [], "usage": self._usage()}] if self._counts else []
        return [*out, *usage, "data: [DONE]"]

    def _chunk(self, piece: Object, finish: str | None = None, index: int | None = None) -> Object:
        choice = {
            "index": len(self._choices) if index is None else index,
            "logprobs": None,
            **piece,
            "finish_reason": finish,
        }
        return {
            **self._head,
            "object": self.kinds[1],
            "choices": [choice],
            **({"usage": None} if self._counts else {}),
        }

    def _usage(self) -> Object:
        """A prompt counts once, however many choices it has."""
        prompt, cached = (
            sum(getattr(usage, key) for usage in self._usages[:: self._n])
            for key in ("prompt_tokens", "cached_tokens")
        )
        written, thought = (
            sum(getattr(usage, key) for usage in self._usages)
            for key in ("completion_tokens", "thinking_tokens")
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def _piece(self, text: str, tokens: list[Token]) -> Object:
        """The part of a chunk's choice that carries text."""
        raise NotImplementedError

    def _choice(self) -> Object:
        """The part of a whole choice that carries all of it."""
        raise NotImplementedError


class OpenAIChat(_Completions):
    """POST /v1/chat/completions. Reasoning goes by both names it has among local servers and their
    clients. The ids of calls are the engine's, by which it finds what it has generated when they
    come back."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def __init__(self, body: Object):
        super().__init__(body, "max_completion_tokens", "max_tokens")
        top = field(body, "top_logprobs", int, default=0, low=0, high=20)
        self.request.logprobs = top if field(body, "logprobs", bool, default=False) else None
        turns = require_content(
            chat_turns(items(body, "messages", dict, required=True), openai_text)
        )
        form = field(body, "response_format", dict, default={})
        fill_conversation(
            self.request,
            body,
            items(body, "tools", dict),
            turns,
            field(body, "reasoning_effort", str),
            form,
            "response_format.",
        )

    def open(self, generation: Any) -> list[Object]:
        super().open(generation)
        return [
            self._chunk({"delta": {"role": "assistant", "content": ""}}, index=index)
            for index in range(self._n)
        ]

    def event(self, event: Event) -> list[Object | str]:
        match event:
            case Thinking(text):
                self._thoughts += text
                return [self._chunk({"delta": _reasoning(text)})]
            case ToolStart(id, name):
                self._calls.append(
                    {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                )
                return [
                    self._call({**self._calls[-1], "function": {"name": name, "arguments": ""}})
                ]
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
        return {
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(tokens) if text else None,
        }

    def _choice(self) -> Object:
        message = {
            "role": "assistant",
            "content": self._text or (None if self._calls else ""),
            "refusal": None,
            **(_reasoning(self._thoughts) if self._thoughts else {}),
            **({"tool_calls": self._calls} if self._calls else {}),
        }
        return {"message": message, "logprobs": self._logprobs(self._tokens)}

    def _logprobs(self, tokens: list[Token]) -> Object | None:
        return (
            None
            if self.request.logprobs is None
            else {"content": token_objects(tokens), "refusal": None}
        )


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
        # As OpenAI has it
        self.request.max_tokens = 16 if body.get("max_tokens") is None else self.request.max_tokens
        self.request.logprobs = field(body, "logprobs", int, low=0, high=20)
        given = body.get("prompt")
        prompts = (
            given
            if isinstance(given, list) and not all(is_type(one, int) for one in given)
            else [given]
        )
        for prompt in prompts:
            tokens = isinstance(prompt, list) and all(is_type(token, int) for token in prompt)
            if not (prompt and (tokens or isinstance(prompt, str))):
                raise WireError(
                    400, "prompt: Input should be text, token ids, or a list of such, and not empty"
                )
        if len(prompts) * self._n > _MOST_CHOICES:
            raise WireError(
                400, f"prompt: more than {_MOST_CHOICES} choices are not supported by this server"
            )
        self._prompts = prompts

    def _piece(self, text: str, tokens: list[Token]) -> Object:
        return {"text": text, "logprobs": self._logprobs(tokens, len(self._text)) if text else None}

    def _choice(self) -> Object:
        return {"text": self._text, "logprobs": self._logprobs(self._tokens, 0)}

    def _logprobs(self, tokens: list[Token], offset: int) -> Object | None:
        if self.request.logprobs is None:
            return None
        ends = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{one.text: one.logprob for one in token.top} for token in tokens],
            "text_offset": list(ends)[: len(tokens)],
        }


class OpenAIEmbeddings(Embeddings):
    """POST /v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

    dialect = "openai"

    def __init__(self, body: Object):
        given = body.get("input")
        texts = (
            [given]
            if isinstance(given, str)
            or isinstance(given, list)
            and is_type(next(iter(given), None), int)
            else given
        )
        if (
            not isinstance(texts, list)
            or not texts
            or not all(
                isinstance(text, str)
                or isinstance(text, list)
                and all(is_type(token, int) for token in text)
                for text in texts
            )
        ):
            raise WireError(
                400,
                "input: Input should be a string, a list of strings, or one or more lists of token ids",
            )
        if len(texts) > _MOST_TEXTS:
            raise WireError(400, f"input: List should have at most {_MOST_TEXTS} items")
        self._format = field(body, "encoding_format", str, default="float")
        if self._format not in ("float", "base64"):
            raise WireError(400, "encoding_format: Input should be 'float' or 'base64'")
        super().__init__(
            model_name(body),
            texts,
            truncate=False,
            dimensions=field(body, "dimensions", int, low=1),
        )

    def whole(self) -> Object:
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector if self._format == "float" else _packed(vector),
            }
            for index, vector in enumerate(self.unit_vectors())
        ]
        return {
            "object": "list",
            "data": data,
            "model": self.request.model,
            "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens},
        }


def _packed(vector: list[float]) -> str:
    """A vector as little-endian floats of 32 bits, in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def openai_error(error: Exception) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception. Both vendors' clients try again by the same
    rules; only 529 is Anthropic's own."""
    status, headers, body = anthropic_error(error, "")
    status, message, code, param = (
        503 if status == 529 else status,
        body["error"]["message"],
        _CODES.get(status),
        None,
    )
    match error:
        case WireError() if at := re.match(r"[a-z_]\w*(\.\w+)*(?=: )", message):
            param = at[0]
        case ModelNotFound():
            message, code = str(error), "model_not_found"
        case PromptTooLong():
            message, code = (
                (
                    f"This model's maximum context length is {error.maximum} tokens. However, your messages "
                    f"resulted in {error.tokens} tokens."
                ),
                "context_length_exceeded",
            )
    kind = "invalid_request_error" if status < 500 else "server_error"
    return (
        status,
        headers,
        {"error": {"message": message, "type": kind, "param": param, "code": code}},
    )
