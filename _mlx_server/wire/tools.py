"""Tool definitions, tool choice and tool arguments, as far as the dialects share them."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from _mlx_server.wire.fields import Object, WireError, encodable, field, nested
from _mlx_server.wire.json_text import MAX_VALUES, TooManyValues, ValueCounter

log = logging.getLogger("mlx_server")

MAX_TOOLS = 4096  # of a request, also those that the model is not shown


def check_number(tools: list[Object]) -> None:
    """Raises WireError 400 for too many tools."""
    if len(tools) > MAX_TOOLS:
        raise WireError(400, f"tools: List should have at most {MAX_TOOLS} items")


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
    check_number(tools)
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


class PastArguments:
    """Reads the arguments of a body's past calls."""

    def __init__(self) -> None:
        self._values = ValueCounter()

    def read(self, value: Any, path: str) -> Object:
        """The arguments of the call at `path` as an object. A string is parsed as JSON; what is no
        object becomes the argument `input`. Raises WireError if all of them have too many
        values."""
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):
                value = encodable(self._load(value or "{}", path), value)
        if value is None:
            return {}
        return value if isinstance(value, dict) else {"input": value}

    def _load(self, text: str, path: str) -> Any:
        try:
            return self._values.load(text)
        except TooManyValues:
            most = f"the arguments of all calls have more than {MAX_VALUES} values"
            raise WireError(413, f"{path}: {most}") from None
