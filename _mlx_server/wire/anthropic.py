"""The answer of Anthropic's Messages API, whole or as a stream:
https://platform.claude.com/docs/en/build-with-claude/streaming"""

from __future__ import annotations

from _mlx_server.inference.protocol import (
    Done,
    Event,
    Text,
    Thinking,
    ToolEnd,
    ToolInput,
    ToolStart,
    Usage,
)
from _mlx_server.wire.anthropic_request import messages_request
from _mlx_server.wire.errors import anthropic_error
from _mlx_server.wire.fields import Object, field
from _mlx_server.wire.reply import Accepted, Frames, Reply

# By a block's type: the type of its deltas, and the key of a delta's text
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_SIGNATURE = "bWx4LXNlcnZlcg=="  # clients do not send thinking back whose signature is empty
_STOP_REASONS = {  # by `Done.reason`
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "context": "model_context_window_exceeded",
    "load": "end_turn",
}


class AnthropicMessages(Reply):
    """POST /v1/messages. Blocks come strictly one after the other, so `_content` is both what was
    streamed and what `whole` returns. `request_id` goes into an error event."""

    dialect = "anthropic"
    framing = "events"
    # Some clients give up when for 300 s only pings came. After so many seconds an empty delta is
    # sent instead.
    LULL = 150.0

    def __init__(self, body: Object, request_id: str = ""):
        self.request = messages_request(body)
        self.stream = field(body, "stream", bool, default=False)
        self.request_id = request_id
        # "updates" asks for notes between calls, which local models do not write. It hides the
        # reasoning as "omitted" does.
        self._hides_thinking = (body.get("thinking") or {}).get("display") in ("omitted", "updates")
        self._content: list[Object] = []
        self._block_type = ""  # of the block being written, "" between two blocks
        self._leading_space = ""  # of a text block, which is begun only once it has words
        self._message: Object = {}

    def open(self, generation: Accepted) -> Frames:
        usage = Usage(generation.prompt_tokens, generation.cached_tokens, 1)
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
            "usage": _usage_object(usage),
        }
        return [{"type": "message_start", "message": self._message}]

    def event(self, event: Event) -> Frames:
        match event:
            case Thinking(text):
                return self._write_thinking(text)
            case Text(text):
                return self._write_text(text)
            case ToolStart(id, name):
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
                return [*self._start_block(block), self._delta("")]
            case ToolInput(piece):
                return [self._delta(piece)]
            case ToolEnd(arguments):
                self._content[-1]["input"] = arguments
                return self._stop_block()
            case Done():
                return self._end(event)
        return []

    def ping(self, lull: float = 0.0) -> Frames:
        if lull < self.LULL:
            return [{"type": "ping"}]
        frames = [] if self._block_type else self._start_block({"type": "text", "text": ""})
        return [*frames, self._delta("")]

    def failure(self, error: Exception) -> Frames:
        _, _, body = anthropic_error(error, self.request_id)
        return [body]

    def whole(self) -> Object:
        return self._message

    def _write_thinking(self, text: str) -> Frames:
        frames: Frames = []
        if self._block_type != "thinking":
            frames = self._start_block({"type": "thinking", "thinking": "", "signature": ""})
        if text and not self._hides_thinking:
            self._content[-1]["thinking"] += text
            frames.append(self._delta(text))
        return frames

    def _write_text(self, text: str) -> Frames:
        frames: Frames = []
        if self._block_type != "text":
            text = self._leading_space + text
            if not text.strip():
                self._leading_space = text
                return []
            frames = self._start_block({"type": "text", "text": ""})
        self._content[-1]["text"] += text
        return [*frames, self._delta(text)]

    def _end(self, done: Done) -> Frames:
        """Closes the message. An answer without any block gets one empty text block."""
        frames: Frames = []
        if not self._content:
            frames = self._start_block({"type": "text", "text": ""})
        frames += self._stop_block()
        ending = {
            "stop_reason": _STOP_REASONS[done.reason],
            "stop_sequence": done.stop_sequence,
            "stop_details": None,
        }
        usage = _usage_object(done.usage)
        created = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
        self._message = {
            **self._message,
            **ending,
            "content": self._content,
            "usage": {**usage, "cache_creation": created, "service_tier": "standard"},
        }
        delta = {"type": "message_delta", "delta": ending, "usage": usage}
        return [*frames, delta, {"type": "message_stop"}]

    def _start_block(self, block: Object) -> Frames:
        """Closes the open block and begins another. After the first start comes a ping, as
        Anthropic's own servers send it."""
        frames = self._stop_block()
        self._leading_space, self._block_type = "", block["type"]
        self._content.append(dict(block))
        index = len(self._content) - 1
        frames.append({"type": "content_block_start", "index": index, "content_block": block})
        return frames + (self.ping() if index == 0 else [])

    def _delta(self, text: str) -> Object:
        """A piece of the open block."""
        delta_type, key = _DELTAS[self._block_type]
        return self._block_delta({"type": delta_type, key: text})

    def _block_delta(self, delta: Object) -> Object:
        index = len(self._content) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _stop_block(self) -> Frames:
        if not self._block_type:
            return []
        frames: Frames = []
        if self._block_type == "thinking":
            self._content[-1]["signature"] = _SIGNATURE
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            frames.append(self._block_delta(delta))
        self._block_type = ""
        return [*frames, {"type": "content_block_stop", "index": len(self._content) - 1}]


def _usage_object(usage: Usage) -> Object:
    """Token counts. Input, cache reads and cache creation add up to the whole prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.thinking_tokens},
    }
