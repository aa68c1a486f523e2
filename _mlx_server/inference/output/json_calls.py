"""Tool calls that are JSON objects, read with some forgiveness."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.output.call_syntax import (
    JSON_START,
    CallTemplate,
    ObjectSyntax,
    pattern,
)

Calls = list[tuple[str, Any]]  # names and arguments
ParseCalls = Callable[[str, list[dict[str, Any]]], Calls]  # of a text and the tools


class CutShort(ValueError):
    """The text ends inside a string. If an end tag follows there, it belongs to the string."""


# `{"name": N, "arguments": {…}}`, once or several times, in a list or a code block or without.
JSON_CALL = ObjectSyntax(
    head=pattern(
        r"\s*+(?:```(?:json)?+)?+",
        r"(?>[\s,;{}\[\]]*\{)\s*+",  # commas and semicolons between calls, a list's bracket
        r'(?:"(?:type|id|index)"\s*+:\s*+(?:"[^"\\<]*+"|\d++)\s*+,\s*+){0,3}+',
        r'(?:"function"\s*+:\s*+\{\s*+)?+',  # OpenAI's form
        r'"name"\s*+:\s*+"([^"\\]++)"\s*+,\s*+',
        r'(?:"id"\s*+:\s*+"[^"\\<]*+"\s*+,\s*+)?+',
        r'"(?:arguments|parameters)"\s*+:\s*+',
        JSON_START,
    ),
    tail=pattern(r"[\s,;}\]`]*+"),
    enclosed=True,
    next_call=("{",),
    bare_heads=tuple(
        fence + "{" + type_member + '"name":"NAME"'
        for fence in ("", "```", "```json")
        for type_member in ("", '"type":"function",')
    ),
    template=CallTemplate(head='\n{"name": "NAME", "arguments": ', tail="}\n"),
)

# What may stand around the JSON objects of one block: list brackets, commas, doubled braces.
_BEFORE_OBJECT = re.compile(r"[\s,{}\[\]]*(?=\{)")
_STRING_OR_STRAY_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


def read_json(text: str) -> tuple[Any, str]:
    """The JSON value at the beginning of `text` and what follows it. Forgives raw newlines in
    strings and commas before a closing bracket. Raises CutShort inside an unfinished string, else
    ValueError."""
    try:
        value, end = _decode(text, 0)
    except CutShort:
        raise
    except ValueError:
        text = _without_stray_commas(text)
        value, end = _decode(text, 0)
    return value, text[end:]


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends. Raises CutShort, ValueError."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise CutShort(error.msg) from None
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_stray_commas(text: str) -> str:
    return _STRING_OR_STRAY_COMMA.sub(lambda match: match[1] or "", text)


def parse_json_calls(text: str, tools: list[dict[str, Any]]) -> Calls:
    """`{"name": N, "arguments": {…}}` in any order of keys, once or several times; text after the
    objects is ignored."""
    calls: Calls = []
    position, mended = 0, False
    while gap := _BEFORE_OBJECT.match(text, position):
        try:
            value, position = _decode(text, gap.end())
        except ValueError as error:
            if mended or isinstance(error, CutShort):
                if calls:
                    break
                raise
            # Once for all objects that follow
            text, position, mended = _without_stray_commas(text[gap.end() :]), 0, True
            continue
        if "name" not in value:
            break
        calls.append((value["name"], value.get("arguments", value.get("parameters"))))
    if not calls:
        raise ValueError("no JSON object with a name")
    return calls
