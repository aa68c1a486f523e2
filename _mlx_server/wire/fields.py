"""Checked access to the fields of a JSON body, and the error that a wrong field raises.

A `path` says where a value stands in the body, as in "messages.0.content"; it is empty for the body
itself. An error message begins with the path of the value that is wrong."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, overload

from _mlx_server.inference.catalog.library import MAX_NAME

Object = dict[str, Any]
"""A JSON object."""

T = TypeVar("T")

_TYPE_NAMES: dict[type, str] = {
    str: "a valid string",
    bool: "a valid boolean",
    int: "a valid integer",
    float: "a valid number",
    list: "a valid list",
    dict: "an object",
}


class WireError(Exception):
    """A request that an API does not allow: the HTTP status, a sentence for the client and the
    headers to send with them."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def is_type(value: Any, expected: type) -> bool:
    """Whether a JSON value has a type. A boolean is not a number, an integer is a `float` too, and
    an integer must fit into 64 bits. NaN and the infinities have no type."""
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if expected is float:
        return is_type(value, int) or isinstance(value, float) and math.isfinite(value)
    return isinstance(value, expected)


@overload
def field(
    body: Object,
    key: str,
    expected: type[T],
    path: str = "",
    *,
    required: Literal[True],
    low: float | None = None,
    high: float | None = None,
) -> T: ...


@overload
def field(
    body: Object,
    key: str,
    expected: type[T],
    path: str = "",
    *,
    default: T,
    low: float | None = None,
    high: float | None = None,
) -> T: ...


@overload
def field(
    body: Object,
    key: str,
    expected: type[T],
    path: str = "",
    *,
    required: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> T | None: ...


def field(
    body: Object,
    key: str,
    expected: type[T],
    path: str = "",
    *,
    required: bool = False,
    default: T | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """`body[key]` if it has the expected type and lies between `low` and `high`; `default` if it is
    absent or null. `path` is where `body` stands. Raises WireError 400."""
    value = body.get(key)
    if value is None and not required:
        return default
    fault = None
    if value is None:
        fault = "Field required"
    elif not is_type(value, expected):
        fault = f"Input should be {_TYPE_NAMES[expected]}"
    elif low is not None and value < low:
        fault = f"Input should be greater than or equal to {low}"
    elif high is not None and value > high:
        fault = f"Input should be less than or equal to {high}"
    if fault:
        raise WireError(400, f"{join_path(path, key)}: {fault}")
    return value


def items(
    body: Object, key: str, expected: type[T], path: str = "", *, required: bool = False
) -> list[T]:
    """The list `body[key]`, all of whose items must have the expected type; empty if it is absent.
    Raises WireError 400."""
    values = field(body, key, list, path, required=required) or []
    for number, value in enumerate(values):
        if not is_type(value, expected):
            place = f"{join_path(path, key)}.{number}"
            raise WireError(400, f"{place}: Input should be {_TYPE_NAMES[expected]}")
    return values


def join_path(path: str, key: str) -> str:
    """The path of `key` in the value at `path`."""
    return f"{path}.{key}" if path else key


def short_name(name: str) -> str:
    """`name`, if it can be a model's. Raises WireError if it is too long."""
    if len(name) > MAX_NAME:
        raise WireError(400, f"model: String should have at most {MAX_NAME} characters")
    return name


def model_name(body: Any) -> str:
    """The model that a body asks for. Raises WireError 400 if it names none."""
    if not isinstance(body, dict):
        raise WireError(400, "Input should be an object")
    name = field(body, "model", str, required=True)
    if not name:
        raise WireError(400, "model: String should have at least 1 character")
    return name


def content_blocks(content: Any, path: str) -> list[Object]:
    """Content as a list of blocks; a string is one text block. Raises WireError 400."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise WireError(400, f"{path}: Input should be a valid string or list")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise WireError(400, f"{path}.{number}: Input should be an object")
    return content


def nested(value: Object, key: str, path: str) -> tuple[Object, str]:
    """The object `value[key]` and its path if there is one, else `value` and `path`: one API puts
    into an object of its own what another puts beside it."""
    inner = value.get(key)
    return (inner, join_path(path, key)) if isinstance(inner, dict) else (value, path)


def encodable(value: Any, text: str) -> Any:
    """`value`, which the JSON `text` was parsed to, in a form that UTF-8 can encode: half a
    surrogate pair becomes "?", since no tokenizer can read it."""
    return _encodable(value) if "\\ud" in text or "\\uD" in text else value


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return list(map(_encodable, value)) if isinstance(value, list) else value


def timestamp(seconds: float) -> str:
    """Unix seconds as RFC 3339 with microseconds, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> str:
    """The present as `timestamp` writes it."""
    return timestamp(datetime.now(UTC).timestamp())
