"""Tool calls that are JSON objects, read with some forgiveness."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Calls = list[tuple[str, Any]]
ParseCalls = Callable[[str, list[dict]], Calls]


class CutShort(ValueError):
    """A call as far as it goes, but it ends inside a value: an end tag found there belongs to the
    value."""


# What may stand around the JSON objects of one block: list brackets, commas, doubled braces.
_BEFORE_OBJECT = re.compile(r"[\s,{}\[\]]*(?=\{)")
_STRING_OR_STRAY_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


def read_json(text: str) -> tuple[Any, str]:
    """The JSON value at the beginning of `text` and what follows it. Forgives raw newlines in
    strings and commas before a closing bracket. Raises CutShort inside an unfinished string, else
    ValueError."""
    decoder = json.JSONDecoder(strict=False)
    try:
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                raise CutShort(error.msg) from None
            text = _STRING_OR_STRAY_COMMA.sub(lambda match: match[1] or "", text)
            value, end = decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, text[end:]


def parse_json_calls(text: str, tools: list[dict]) -> Calls:
    """`{"name": N, "arguments": {…}}` in any order of keys, once or several times; text after the
    objects is ignored."""
    calls: Calls = []
    while gap := _BEFORE_OBJECT.match(text):
        try:
            value, text = read_json(text[gap.end() :])
        except ValueError:
            if calls:
                break
            raise
        if "name" not in value:
            break
        calls.append((value["name"], value.get("arguments", value.get("parameters"))))
    if not calls:
        raise ValueError("no JSON object with a name")
    return calls
