"""Checking the fields of JSON bodies."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
"""A JSON object of some wire."""


class WireError(Exception):
    """A request that its wire does not allow: HTTP status, a sentence for the client and headers to
    send with it."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


_KINDS = {
    str: "a valid string",
    bool: "a valid boolean",
    int: "a valid integer",
    float: "a valid number",
    list: "a valid list",
    dict: "an object",
}


def is_type(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind: a boolean is no number, an integer is a `float` too, NaN
    is nothing."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return is_type(value, int) or isinstance(value, float) and math.isfinite(value)
    return isinstance(value, kind)


def field(
    body: Object,
    key: str,
    kind: type,
    path: str = "",
    *,
    required: bool = False,
    default: Any = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """`body[key]`, checked. Null is absent. `path` ("messages.0.") precedes the key in the sentence
    of a WireError."""
    value = body.get(key)
    if value is None:
        if required:
            raise WireError(400, f"{path}{key}: Field required")
        return default
    if not is_type(value, kind):
        raise WireError(400, f"{path}{key}: Input should be {_KINDS[kind]}")
    if low is not None and value < low:
        raise WireError(400, f"{path}{key}: Input should be greater than or equal to {low}")
    if high is not None and value > high:
        raise WireError(400, f"{path}{key}: Input should be less than or equal to {high}")
    return value


def items(body: Object, key: str, kind: type, path: str = "", *, required: bool = False) -> list:
    """The list `body[key]` with all its items checked to be of `kind`."""
    values = field(body, key, list, path, required=required, default=[])
    for number, value in enumerate(values):
        if not is_type(value, kind):
            raise WireError(400, f"{path}{key}.{number}: Input should be {_KINDS[kind]}")
    return values


def model_name(body: Any) -> str:
    """The model that a body asks for. Raises WireError if it names none."""
    if not isinstance(body, dict):
        raise WireError(400, "Input should be an object")
    name = field(body, "model", str, required=True)
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


def nested(value: Object, key: str, path: str) -> tuple[Object, str]:
    """What one API writes into an object of its own and the other beside it, and the path to it."""
    return (value[key], f"{path}{key}.") if isinstance(value.get(key), dict) else (value, path)


def encodable(value: Any, text: str) -> Any:
    """What JSON `text` has been parsed to, with "?" for half a surrogate pair, which is no text
    that a tokenizer could read."""
    return (
        json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        if "\\ud" in text.lower()
        else value
    )


def timestamp(seconds: float) -> str:
    """Unix seconds as RFC 3339 with microseconds, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> str:
    return timestamp(datetime.now(UTC).timestamp())
