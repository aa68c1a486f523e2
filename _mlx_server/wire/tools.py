"""Tool definitions, tool choice and tool arguments, as far as the dialects share them."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

from _mlx_server.wire.fields import Object, WireError, encodable, field, nested

log = logging.getLogger("mlx_server")


def tool_form(name: str, description: str, schema: Object) -> Object:
    """A tool in OpenAI's form, which chat templates know. Its schema always has the type `object`
    and `properties`."""
    schema = {**schema, "type": "object"} if "type" in schema else {"type": "object", **schema}
    if not isinstance(schema.get("properties"), dict):
        schema["properties"] = {}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def function_tools(tools: list[Object]) -> list[Object]:
    """The functions among the tools of a body. OpenAI's chat and Ollama put a function's fields
    into `function`, OpenAI's responses put them beside `type`. Raises WireError 400.

    Tools of other types are left out with a warning, but refused if there are no functions."""
    functions, other_types = [], []
    for number, tool in enumerate(tools):
        path = f"tools.{number}"
        tool_type = field(tool, "type", str, path, default="function")
        if tool_type != "function" and "function" not in tool:
            other_types.append(tool_type)
            continue
        function, path = nested(tool, "function", path)
        functions.append(
            tool_form(
                field(function, "name", str, path, required=True),
                field(function, "description", str, path, default=""),
                field(function, "parameters", dict, path, default={}),
            )
        )
    if other_types and not functions:
        raise WireError(
            400, f"tools: tools of type '{other_types[0]}' are not supported by this server"
        )
    if other_types:
        log.warning("tools of these types were left out: %s", ", ".join(other_types))
    return functions


def any_strict(tools: list[Object]) -> bool:
    """Whether one of the tools of a body is strict. Then the calls of all of them must match their
    schemas."""
    return any(nested(tool, "function", "")[0].get("strict") is True for tool in tools)


def forced_choice(choice_type: str, name: str | None, tools: list[Object], path: str) -> str:
    """`Request.tool_choice` for a call that must be made: of the tool `name`, or of any tool if it
    is None. `path` is where the name stands. Raises WireError 400 if no such tool is there."""
    if not tools:
        raise WireError(400, f"tool_choice: '{choice_type}' needs tools to choose from")
    if name is not None and name not in [tool["function"]["name"] for tool in tools]:
        raise WireError(400, f"{path}.name: Tool '{name}' not found in provided tools")
    return "any" if name is None else name


def call_arguments(value: Any) -> Object:
    """The arguments of a past call as an object. A string is parsed as JSON; what is no object
    becomes the argument `input`."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = encodable(json.loads(value or "{}"), value)
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"input": value}
