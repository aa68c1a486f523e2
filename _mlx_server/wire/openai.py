"""OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat) and completions
(https://platform.openai.com/docs/api-reference/completions)"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import replace
from typing import Any

from _mlx_server.inference.protocol import (
    Done,
    Event,
    Request,
    Sampling,
    Text,
    Thinking,
    Token,
    ToolInput,
    ToolStart,
    Usage,
)
from _mlx_server.wire.chat_messages import chat_turns
from _mlx_server.wire.conversation import require_content
from _mlx_server.wire.errors import openai_error
from _mlx_server.wire.fields import Object, WireError, field, is_type, items
from _mlx_server.wire.images import Images
from _mlx_server.wire.openai_request import fill_conversation, openai_request, openai_text
from _mlx_server.wire.reply import Accepted, Frames, Reply, token_objects

# By `Done.reason`; for all others it is "stop"
_FINISH_REASONS = {"length": "length", "context": "length", "tool_calls": "tool_calls"}
_MAX_CHOICES = 32  # in one request


class _Completions(Reply):
    """What chats and completions have in common. Choices come one after the other: each `Done` ends
    a choice, and the last one ends the answer."""

    dialect = "openai"
    framing = "data"
    id_prefix: str
    whole_type: str  # the "object" of an answer that is not streamed
    chunk_type: str  # the "object" of a stream's pieces

    def __init__(self, body: Object, *limits: str):
        self.request = openai_request(body, *limits)
        self.stream = field(body, "stream", bool, default=False)
        options = field(body, "stream_options", dict, default={})
        self._streams_usage = field(options, "include_usage", bool, "stream_options", default=False)
        self._n = field(body, "n", int, default=1, low=1, high=_MAX_CHOICES)  # choices per prompt
        self._prompts: list[str | list[int] | None] = [None]
        self._head: Object = {}  # the fields that all objects of the answer have
        self._choices: list[Object] = []  # those that have ended
        self._usages: list[Usage] = []
        self._begin_choice()

    @property
    def requests(self) -> list[Request]:
        """One for each choice: all those of a prompt, then those of the next. If a seed is given,
        each choice of a prompt has another one."""
        return [
            replace(self.request, prompt=prompt, sampling=self._sampling(number))
            for prompt in self._prompts
            for number in range(self._n)
        ]

    def _sampling(self, number: int) -> Sampling:
        sampling = self.request.sampling
        return replace(sampling, seed=None if sampling.seed is None else sampling.seed + number)

    def open(self, generation: Accepted) -> Frames:
        self._head = {
            "id": f"{self.id_prefix}-{generation.id}",
            "created": int(time.time()),
            "model": self.request.model,
        }
        return []

    def event(self, event: Event) -> Frames:
        match event:
            case Text(text, tokens):
                fields = self._chunk_fields(text, tokens)
                self._text += text
                if not self.stream:
                    self._tokens += tokens
                    self.hold_logprobs(tokens)
                return [self._chunk(fields)]
            case Done():
                return self._end_choice(event)
        return []

    def ping(self, lull: float = 0.0) -> Frames:
        return [": ping"]

    def failure(self, error: Exception) -> Frames:
        _, _, body = openai_error(error)
        return [body]

    def whole(self) -> Object:
        return {
            **self._head,
            "object": self.whole_type,
            "choices": self._choices,
            "usage": self._usage(),
        }

    def _begin_choice(self) -> None:
        self._text = ""
        self._tokens: list[Token] = []

    def _end_choice(self, done: Done) -> Frames:
        finish_reason = _FINISH_REASONS.get(done.reason, "stop")
        chunk = self._chunk(self._chunk_fields("", []), finish_reason)
        index = len(self._choices)
        choice = {"index": index, **self._choice_fields(), "finish_reason": finish_reason}
        self._choices.append(choice)
        self._usages.append(done.usage)
        self._begin_choice()
        if len(self._choices) < len(self._prompts) * self._n:
            return [chunk]
        frames: Frames = [chunk]
        if self._streams_usage:
            frames.append({**chunk, "choices": [], "usage": self._usage()})
        return [*frames, "data: [DONE]"]

    def _chunk(
        self, fields: Object, finish_reason: str | None = None, index: int | None = None
    ) -> Object:
        """A piece of the choice `index`, by default the one being written."""
        choice = {
            "index": len(self._choices) if index is None else index,
            "logprobs": None,
            **fields,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "object": self.chunk_type, "choices": [choice]}
        return {**chunk, "usage": None} if self._streams_usage else chunk

    def _usage(self) -> Object:
        """Token counts. A prompt counts once, however many choices it has."""
        by_prompt = self._usages[:: self._n]
        prompt = sum(usage.prompt_tokens for usage in by_prompt)
        cached = sum(usage.cached_tokens for usage in by_prompt)
        completion = sum(usage.completion_tokens for usage in self._usages)
        thinking = sum(usage.thinking_tokens for usage in self._usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thinking},
        }

    def _chunk_fields(self, text: str, tokens: list[Token]) -> Object:
        """The fields of a chunk's choice that carry text."""
        raise NotImplementedError

    def _choice_fields(self) -> Object:
        """The fields of a whole choice that carry what was generated."""
        raise NotImplementedError


class OpenAIChat(_Completions):
    """POST /v1/chat/completions. Reasoning is in both fields that local servers and their clients
    use for it. The ids of calls are the engine's: by them it finds the tokens of a call when it
    comes back in a later request."""

    id_prefix = "chatcmpl"
    whole_type, chunk_type = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: Object):
        super().__init__(body, "max_completion_tokens", "max_tokens")
        top_logprobs = field(body, "top_logprobs", int, default=0, low=0, high=20)
        if field(body, "logprobs", bool, default=False):
            self.request.logprobs = top_logprobs
            self.bound_logprobs(self._n)
        messages = items(body, "messages", dict, required=True)
        images = Images()
        text_of = functools.partial(openai_text, images=images)
        turns = require_content(chat_turns(messages, text_of))
        self.request.images = images.files
        output_format = field(body, "response_format", dict, default={})
        fill_conversation(
            self.request,
            body,
            items(body, "tools", dict),
            turns,
            effort=field(body, "reasoning_effort", str),
            output_format=output_format,
            format_path="response_format",
        )

    def open(self, generation: Accepted) -> Frames:
        super().open(generation)
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"delta": delta}, index=index) for index in range(self._n)]

    def event(self, event: Event) -> Frames:
        match event:
            case Thinking(text):
                self._thoughts += text
                return [self._chunk({"delta": _reasoning(text)})]
            case ToolStart(id, name):
                self._calls.append(_call(id, name))
                return [self._call_chunk(_call(id, name))]
            case ToolInput(piece):
                self._calls[-1]["function"]["arguments"] += piece
                return [self._call_chunk({"function": {"arguments": piece}})]
        return super().event(event)

    def _begin_choice(self) -> None:
        super()._begin_choice()
        self._thoughts = ""
        self._calls: list[Object] = []

    def _call_chunk(self, fields: Object) -> Object:
        """A piece of the last call."""
        call = {"index": len(self._calls) - 1, **fields}
        return self._chunk({"delta": {"tool_calls": [call]}})

    def _chunk_fields(self, text: str, tokens: list[Token]) -> Object:
        if not text:
            return {"delta": {}, "logprobs": None}
        return {"delta": {"content": text}, "logprobs": self._logprobs(tokens)}

    def _choice_fields(self) -> Object:
        message: Object = {
            "role": "assistant",
            "content": self._text or (None if self._calls else ""),
            "refusal": None,
        }
        if self._thoughts:
            message |= _reasoning(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        return {"message": message, "logprobs": self._logprobs(self._tokens)}

    def _logprobs(self, tokens: list[Token]) -> Object | None:
        if self.request.logprobs is None:
            return None
        return {"content": token_objects(tokens), "refusal": None}


def _reasoning(text: str) -> Object:
    return {"reasoning_content": text, "reasoning": text}


def _call(id: str, name: str) -> Object:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}


class OpenAICompletion(_Completions):
    """POST /v1/completions: raw text in, raw text out."""

    id_prefix = "cmpl"
    whole_type = chunk_type = "text_completion"

    def __init__(self, body: Object):
        super().__init__(body, "max_tokens")
        for key, harmless in (("echo", False), ("suffix", ""), ("best_of", 1)):
            if body.get(key) not in (None, harmless):
                raise WireError(400, f"{key}: not supported by this server")
        if body.get("max_tokens") is None:
            self.request.max_tokens = 16  # OpenAI's default
        self.request.logprobs = field(body, "logprobs", int, low=0, high=20)
        self._prompts = _prompts(body.get("prompt"))
        if len(self._prompts) * self._n > _MAX_CHOICES:
            raise WireError(
                400, f"prompt: more than {_MAX_CHOICES} choices are not supported by this server"
            )
        self.bound_logprobs(len(self._prompts) * self._n)

    def _chunk_fields(self, text: str, tokens: list[Token]) -> Object:
        logprobs = self._logprobs(tokens, len(self._text)) if text else None
        return {"text": text, "logprobs": logprobs}

    def _choice_fields(self) -> Object:
        return {"text": self._text, "logprobs": self._logprobs(self._tokens, 0)}

    def _logprobs(self, tokens: list[Token], offset: int) -> Object | None:
        """The tokens of a text that begins after `offset` characters of the answer."""
        if self.request.logprobs is None:
            return None
        ends = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {other.text: other.logprob for other in token.top} for token in tokens
            ],
            "text_offset": list(ends)[: len(tokens)],
        }


def _prompts(value: Any) -> list[str | list[int] | None]:
    """The prompts of a body: text, token ids, or a list of such. Raises WireError 400."""
    if isinstance(value, list) and not all(is_type(item, int) for item in value):
        prompts = value
    else:
        prompts = [value]
    for prompt in prompts:
        is_tokens = isinstance(prompt, list) and all(is_type(token, int) for token in prompt)
        if not prompt or not (is_tokens or isinstance(prompt, str)):
            raise WireError(
                400, "prompt: Input should be text, token ids, or a list of such, and not empty"
            )
    return prompts
