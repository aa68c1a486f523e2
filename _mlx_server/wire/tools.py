"""Tool definitions, tool choice and tool arguments as all dialects share them."""

from __future__ import annotations

import json
import logging
from typing import Any

from _mlx_server.wire.fields import Object, WireError, encodable, field, nested

log = logging.getLogger("mlx_server")


def tool_form(name: str, description: str, schema: Object) -> Object:
    """A tool in the form chat templates know. The schema always says `object` and has
    properties."""
    schema = {**schema, "type": "object"} if "type" in schema else {"type": "object", **schema}
    if not isinstance(schema.get("properties"), dict):
        schema["properties"] = {}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def function_tools(tools: list[Object]) -> list[Object]:
    """The tools of a body, which are written as OpenAI's chat and Ollama do it or, flat, as
    OpenAI's responses do. Those of other types are left out. Raises WireError when nothing is left
    then."""
    functions, others = [], []
    for number, tool in enumerate(tools):
        at = f"tools.{number}."
        kind = field(tool, "type", str, at, default="function")
        if kind != "function" and "function" not in tool:
            others.append(kind)
            continue
        function, at = nested(tool, "function", at)
        functions.append(
            tool_form(
                field(function, "name", str, at, required=True),
                field(function, "description", str, at, default=""),
                field(function, "parameters", dict, at, default={}),
            )
        )
    if others and not functions:
        raise WireError(400, f"tools: tools of type '{others[0]}' are not supported by this server")
    if others:
        log.warning("tools of these types were left out: %s", ", ".join(others))
    return functions


def any_strict(tools: list[Object]) -> bool:
    """Whether one of the tools of a body is strict: then the calls of all are held to their
    schemas."""
    return any(nested(tool, "function", "")[0].get("strict") is True for tool in tools)


def forced_choice(kind: str, name: str | None, tools: list[Object], path: str) -> str:
    """`Request.tool_choice` for a demanded call, of the tool `name` if there is one. Raises
    WireError if that cannot be."""
    if not tools:
        raise WireError(400, f"tool_choice: '{kind}' needs tools to choose from")
    if name is not None and name not in [tool["function"]["name"] for tool in tools]:
        raise WireError(400, f"{path}name: Tool '{name}' not found in provided tools")
    return "any" if name is None else name


def call_arguments(value: Any) -> Object:
    """A past call's arguments as the object they should have been."""
    if isinstance(value, str):
        try:
            value = encodable(json.loads(value or "{}"), value)
        except (ValueError, RecursionError):
            pass
    return value if isinstance(value, dict) else {} if value is None else {"input": value}
