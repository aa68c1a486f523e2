"""The fields that bodies of Ollama's API share:
https://github.com/ollama/ollama/blob/main/docs/api.md and api/types.go beside it"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from _mlx_server.inference.protocol import Sampling
from _mlx_server.wire.fields import Object, WireError, field, is_type, items, join_path
from _mlx_server.wire.images import Images

# https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx#valid-parameters-and-values. Options
# that are not listed are ignored, as Ollama does.
_FLOAT_OPTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_INTEGER_OPTIONS = (
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
)
# Possessive: clients choose the text, and a match must not take longer than the text is
_NUMBER = r"(?:\d++(?:\.\d*+)?|\.\d++)"
_UNIT = "(?:ns|us|µs|μs|ms|s|m|h)"
_PART = re.compile(f"({_NUMBER})({_UNIT})", re.ASCII)
_DURATION = re.compile(f"(?:{_NUMBER}{_UNIT})++", re.ASCII)
_SECONDS_ONLY = re.compile(_NUMBER, re.ASCII)
_LONGEST_DURATION = 64  # characters
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_LONGEST = 9e9  # seconds: Go counts nanoseconds in 63 bits
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_ALL_TOKENS = 1 << 20  # more than any context has


def ollama_model_name(body: Object, status: int, message: str) -> str:
    """The model that a body asks for. Raises WireError, with `status` and `message` if the body
    names none."""
    name = field(body, "model", str, default="")
    if not name:
        raise WireError(status, message)
    if re.search(r"[\s\x00-\x1f]", name):
        raise WireError(400, "invalid model name")
    return name


def parse_keep_alive(value: Any) -> float | None:
    """`keep_alive` in seconds, -1 for ever, None if absent. Accepts numbers, Go durations ("1h30m")
    and, unlike Ollama, strings with a number of seconds. Raises WireError 400."""
    if value is None:
        return None
    seconds: float | None = None
    if isinstance(value, str):
        seconds = _parse_duration(value)
    elif is_type(value, float):
        seconds = value
    if seconds is None or not math.isfinite(seconds):
        told = json.dumps(value, ensure_ascii=False)[: _LONGEST_DURATION + 2]
        raise WireError(400, f"time: invalid duration {told}")
    return -1.0 if seconds < 0 or seconds > _LONGEST else float(seconds)


def _parse_duration(text: str) -> float | None:
    """Seconds, or None if `text` is no duration."""
    if len(text) > _LONGEST_DURATION:
        return None
    sign = -1 if text.startswith("-") else 1
    digits = text.removeprefix("-").removeprefix("+")
    if _SECONDS_ONLY.fullmatch(digits):
        return sign * float(digits)
    if not _DURATION.fullmatch(digits):
        return None
    return sign * sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(digits))


def ollama_options(body: Object, key: str = "options") -> Object:
    """The object `body[key]` with its options checked; `stop` is always a list. Integers may be
    written as floats. Raises WireError 400."""
    options = {
        name: value
        for name, value in field(body, key, dict, default={}).items()
        if value is not None
    }
    for name in _FLOAT_OPTIONS:
        _check_option(options, name, float, "float32")
    for name in _INTEGER_OPTIONS:
        _check_option(options, name, float, "integer")
        if name in options:
            options[name] = max(-(2**62), min(int(options[name]), 2**62))
    _check_option(options, "use_mmap", bool, "boolean")
    stop = options.get("stop", [])
    options["stop"] = [stop] if isinstance(stop, str) else stop
    if not isinstance(options["stop"], list):
        raise WireError(400, 'option "stop" must be of type array')
    if not all(isinstance(text, str) for text in options["stop"]):
        raise WireError(400, 'option "stop" must be of an array of strings')
    return options


def _check_option(options: Object, name: str, expected: type, type_name: str) -> None:
    if name in options and not is_type(options[name], expected):
        raise WireError(400, f'option "{name}" must be of type {type_name}')


def ollama_sampling(options: Object) -> Sampling:
    """The sampling that checked options ask for."""
    temperature, top_k, seed = (options.get(name) for name in ("temperature", "top_k", "seed"))
    penalty, window = options.get("repeat_penalty"), options.get("repeat_last_n")
    if window == 0:  # means no penalty
        penalty, window = 1.0, None
    elif window is not None and window < 0:
        window = _ALL_TOKENS
    return Sampling(
        temperature=None if temperature is None else max(0.0, temperature),
        top_p=options.get("top_p"),
        top_k=None if top_k is None else max(0, top_k),
        min_p=options.get("min_p"),
        repetition_penalty=penalty,
        repetition_context=window,
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        seed=None if seed is None or seed < 0 else seed,
    )


def ollama_max_tokens(options: Object) -> int | None:
    """The bound on the answer's tokens; a negative `num_predict` is none."""
    limit: int = options.get("num_predict", -1)
    return None if limit < 0 else limit


def ollama_thinking(body: Object) -> tuple[bool | None, str | None]:
    """`Request.thinking` and `Request.effort`. Raises WireError 400.

    https://docs.ollama.com/capabilities/thinking"""
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


def ollama_text(message: Object, path: str, *, images: Images) -> str:
    """The text of a message at `path`, after its images, which go to `images`. Raises WireError
    400."""
    text = field(message, "content", str, path, default="")
    return "\n".join(filter(None, [*image_texts(message, path, images=images), text]))


def image_texts(body: Object, path: str = "", *, images: Images) -> list[str]:
    """What stands for each image of a body or message at `path`. Raises WireError 400 for what is
    not base64."""
    texts = []
    for number, image in enumerate(items(body, "images", str, path)):
        data = image.partition(",")[2] if image.startswith("data:") else image
        data = data.replace("\r", "").replace("\n", "")
        if (place := _wrong_base64(data)) is not None:
            raise WireError(400, f"illegal base64 data at input byte {place}")
        texts.append(images.text(data, f"{join_path(path, 'images')}.{number}"))
    return texts


def _wrong_base64(data: str) -> int | None:
    """Where a text is not base64."""
    strange = data.encode("utf-8", "replace").translate(None, _BASE64)
    end = data.find("=")
    wrong = [data.find(strange.decode()[0])] if strange else []
    wrong += [end] if end >= 0 and data[end:] not in ("=", "==") else []
    return min(wrong, default=len(data) if len(data) % 4 else None)
