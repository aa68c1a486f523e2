"""Ollama's native API, its requests and answers:
https://github.com/ollama/ollama/blob/main/docs/api.md and api/types.go"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from typing import Any

from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.protocol import (
    Done,
    EngineBusy,
    EngineClosed,
    EngineError,
    Event,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
    Request,
    Sampling,
    Text,
    Thinking,
    ToolEnd,
    ToolStart,
)
from _mlx_server.wire.conversation import IMAGE_NOTE, Turn, ask_for_json, canonical, chat_turns
from _mlx_server.wire.fields import Object, WireError, field, is_type, items, now
from _mlx_server.wire.reply import Embeddings, Reply, token_objects
from _mlx_server.wire.tools import function_tools

log = logging.getLogger("mlx_server")


_OPTIONS = {  # type by name; others are ignored, as Ollama does
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "repeat_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        (float, "float32"),
    ),
    **dict.fromkeys(
        (
            "num_predict",
            "num_ctx",
            "num_keep",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "top_k",
            "seed",
            "repeat_last_n",
            "draft_num_predict",
        ),
        (float, "integer"),
    ),
    "use_mmap": (bool, "boolean"),
}
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
# Characters of text in a line: escaped, it stays below the 128 KiB some clients can read
_PIECE = 8_000


def parse_keep_alive(value: Any) -> float | None:
    """`keep_alive` in seconds, -1 for ever, None if absent. Takes numbers and Go durations
    ("1h30m"), and, more kindly than Ollama, numbers as strings. Raises WireError."""
    if value is None:
        return None
    seconds = value if is_type(value, float) else None
    if isinstance(value, str):
        sign, digits = (-1 if "-" in value[:1] else 1), value.removeprefix("-").removeprefix("+")
        if re.fullmatch(r"\d+\.?\d*|\.\d+", digits, re.ASCII):
            seconds = sign * float(digits)
        elif digits and not _DURATION.sub("", digits):
            seconds = sign * sum(
                float(number) * _UNITS[unit] for number, unit in _DURATION.findall(digits)
            )
    if seconds is None or not math.isfinite(seconds):
        raise WireError(400, f"time: invalid duration {json.dumps(value, ensure_ascii=False)}")
    # Go counts nanoseconds in 63 bits
    return -1.0 if seconds < 0 or seconds > 9e9 else float(seconds)


def _ollama_name(body: Object, status: int, nameless: str) -> str:
    """The model that a body asks for; `status` and `nameless` are the error when it names none.
    Raises WireError."""
    name = field(body, "model", str, default="")
    if not name:
        raise WireError(status, nameless)
    if re.search(r"[\s\x00-\x1f]", name):
        raise WireError(400, "invalid model name")
    return name


def ollama_options(body: Object) -> Object:
    """The options given, checked. Integers may be written as floats."""
    options = {
        key: value
        for key, value in field(body, "options", dict, default={}).items()
        if value is not None
    }
    for key, (kind, said) in _OPTIONS.items():
        if key in options and not is_type(options[key], kind):
            raise WireError(400, f'option "{key}" must be of type {said}')
        if key in options and said == "integer":
            options[key] = max(-(2**62), min(int(options[key]), 2**62))
    stop = options.get("stop", [])
    options["stop"] = [stop] if isinstance(stop, str) else stop
    if not isinstance(options["stop"], list):
        raise WireError(400, 'option "stop" must be of type array')
    if not all(isinstance(text, str) for text in options["stop"]):
        raise WireError(400, 'option "stop" must be of an array of strings')
    return options


def ollama_sampling(options: Object) -> Sampling:
    seed, temperature, top_k = (
        options.get("seed", -1),
        options.get("temperature"),
        options.get("top_k"),
    )
    window = options.get("repeat_last_n")  # 0: no penalty, negative: everything
    return Sampling(
        temperature=None if temperature is None else max(0.0, temperature),
        top_p=options.get("top_p"),
        top_k=None if top_k is None else max(0, top_k),
        min_p=options.get("min_p"),
        repetition_penalty=1.0 if window == 0 else options.get("repeat_penalty"),
        repetition_context=1 << 20 if window is not None and window < 0 else window or None,
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        seed=seed if seed >= 0 else None,
    )


def _ollama_think(body: Object) -> tuple[bool | None, str | None]:
    think = body.get("think")
    if think is None or isinstance(think, bool):
        return think, None
    if think not in ("high", "medium", "low", "max"):
        raise WireError(
            400,
            f"invalid think value: {json.dumps(think, ensure_ascii=False)} "
            '(must be "high", "medium", "low", "max", true, or false)',
        )
    return True, think


def _ollama_images(body: Object, path: str = "") -> list[str]:
    """A note for each image."""
    for image in items(body, "images", str, path):
        data = re.sub(
            r"[\r\n]", "", image.partition(",")[2] if image.startswith("data:") else image
        )
        wrong = re.search(r"[^A-Za-z0-9+/=]|=(?!=?\Z)", data)
        if wrong or len(data) % 4:
            raise WireError(
                400, f"illegal base64 data at input byte {wrong.start() if wrong else len(data)}"
            )
    return [IMAGE_NOTE] * len(body.get("images") or [])


def ollama_text(message: Object, path: str) -> str:
    said = field(message, "content", str, path, default="")
    return "\n".join(filter(None, [*_ollama_images(message, path), said]))


class _OllamaReply(Reply):
    """What chat and generate have in common: everything but the name of the place where the text
    stands.

    Tool calls go out whole. Counts and durations stand in the last object only, since some clients
    add them up."""

    dialect = "ollama"
    framing = "lines"
    purpose: str  # what a model must be able to do, in the words of the error
    nameless: tuple[int, str]  # status and text of the error when no model is named
    # Whether the answer ends with the tokens that another one can go on from
    _tells_context = False

    def __init__(self, body: Object):
        if not isinstance(body, dict):
            raise WireError(400, "Input should be an object")
        count = field(body, "top_logprobs", int, default=0)
        if not 0 <= count <= 20:
            raise WireError(400, "top_logprobs must be between 0 and 20")
        if field(body, "_debug_render_only", bool, default=False):
            raise WireError(400, "_debug_render_only is not supported by this server")
        name = _ollama_name(body, *self.nameless)
        self.stream = field(body, "stream", bool, default=True)
        options = ollama_options(body)
        limit = options.get("num_predict", -1)
        thinking, effort = _ollama_think(body)
        self.request = Request(
            name,
            sampling=ollama_sampling(options),
            stop=[text for text in options["stop"] if text],
            max_tokens=limit if limit >= 0 else None,
            thinking=thinking,
            effort=effort,
            logprobs=count if field(body, "logprobs", bool, default=False) else None,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
        )
        self._format = body.get("format") or None
        if self._format not in (None, "json") and not isinstance(self._format, dict):
            raise WireError(
                400,
                f"invalid format: {json.dumps(self._format, ensure_ascii=False)}; "
                'expected "json" or a valid JSON Schema object',
            )
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
                function = {
                    "index": len(self._calls),
                    "name": self._calling.name,
                    "arguments": arguments,
                }
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
        self.request.messages = canonical(chat_turns(messages, ollama_text)) or [
            {"role": "user", "content": ""}
        ]
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
            field(body, key, str, default="") for key in ("prompt", "system", "template", "suffix")
        )
        raw = field(body, "raw", bool, default=False)
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
        self.request.messages = canonical(
            [Turn("system", system), Turn("user", "\n".join([*images, prompt]))]
        )
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
        ollama_options(body)
        super().__init__(
            _ollama_name(body, 404, "model '' not found"),
            texts,
            truncate=field(body, "truncate", bool, default=True),
            dimensions=field(body, "dimensions", int, low=0) or None,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
        )

    def whole(self) -> Object:
        seconds = {
            "total": sum(usage.total_seconds for usage in self.usages),
            "load": sum(usage.load_seconds for usage in self.usages[:1]),
        }
        return {
            "model": self.request.model,
            "embeddings": self.unit_vectors(),
            "prompt_eval_count": self.tokens,
            **{f"{name}_duration": int(value * 1e9) for name, value in seconds.items()},
        }


class OllamaEmbeddings(Embeddings):
    """POST /api/embeddings, the older one: a single vector as the model gives it."""

    dialect = "ollama"

    def __init__(self, body: Object):
        prompt = field(body, "prompt", str, default="")
        ollama_options(body)
        super().__init__(
            _ollama_name(body, 400, "model is required"),
            [prompt] if prompt else [],
            truncate=True,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
        )

    def whole(self) -> Object:
        return {"embedding": self.vectors[0] if self.vectors else []}


def _pieces(text: str) -> list[str]:
    return [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]


def _weighed(tokens: list[Object]) -> Object:
    return {"logprobs": tokens} if tokens else {}


def _ollama_ending(done: Done, tells_context: bool) -> Object:
    """The fields that close an answer. Durations are nanoseconds."""
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
        **({"context": done.tokens} if tells_context else {}),
        **{f"{name}_duration": int(value * 1e9) for name, value in seconds.items()},
        "prompt_eval_count": usage.prompt_tokens,
        "eval_count": usage.completion_tokens,
    }


def ollama_error(error: Exception) -> tuple[int, dict[str, str], Object]:
    """Status, extra headers and body for any exception."""
    headers: dict[str, str] = {}
    match error:
        case WireError():
            status, message, headers = error.status, error.message, error.headers
        case ModelNotFound():
            status, message = 404, f"model '{error.model}' not found"
        case PromptTooLong():
            status, message = (
                400,
                (
                    f"input length ({error.tokens} tokens) exceeds the model's maximum context length "
                    f"({error.maximum} tokens)"
                ),
            )
        case InvalidRequest() | ModelLoadError():
            status, message = 400, str(error)
        case EngineBusy():
            status, message = (
                503,
                "server busy, please try again.  maximum pending requests exceeded",
            )
        case EngineClosed():
            status, message = 503, f"server busy, please try again.  {error}"
        case EngineError():
            status, message = 500, str(error)
        case _:
            status, message = 500, "internal error"
    return status, headers, {"error": message}
