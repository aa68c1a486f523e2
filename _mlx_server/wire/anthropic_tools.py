"""The tools and the tool choice of a Messages body:
https://platform.claude.com/docs/en/agents-and-tools/tool-use/implement-tool-use"""

from __future__ import annotations

import logging

from _mlx_server.wire.fields import Object, WireError, field
from _mlx_server.wire.tools import check_number, forced_choice, tool_form

log = logging.getLogger("mlx_server")

_TOOL_SEARCH = "tool_search_tool_"
_SERVER_TOOLS = (
    "web_search_",
    "web_fetch_",
    "code_execution_",
    _TOOL_SEARCH,
    "advisor_",
    "mcp_toolset",
)


def _schema(required: list[str], **properties: str | list[str]) -> Object:
    """The schema of an object. A property is a JSON type, "array" for a list of integers, or a list
    of the strings that it may be."""
    schemas: dict[str, Object] = {}
    for name, property_type in properties.items():
        if isinstance(property_type, list):
            schemas[name] = {"type": "string", "enum": property_type}
        elif property_type == "array":
            schemas[name] = {"type": "array", "items": {"type": "integer"}}
        else:
            schemas[name] = {"type": property_type}
    return {"type": "object", "properties": schemas, "required": required}


_EDITING = {
    "path": "string",
    "file_text": "string",
    "old_str": "string",
    "new_str": "string",
    "insert_line": "integer",
    "insert_text": "string",
    "view_range": "array",
}
_EDITOR_COMMANDS = ["view", "create", "str_replace", "insert"]
# Tools that clients run but do not describe, by the start of the tool's type: the name, description
# and schema that the model gets.
_CLIENT_TOOLS = {
    "bash_": (
        "bash",
        "Run a command in a persistent bash session, or restart it.",
        _schema([], command="string", restart="boolean"),
    ),
    "text_editor_": (
        "str_replace_based_edit_tool",
        "View, create and edit text files.",
        _schema(["command", "path"], command=_EDITOR_COMMANDS, **_EDITING),
    ),
    "memory_": (
        "memory",
        "Keep notes in files under /memories.",
        _schema(
            ["command"],
            command=[*_EDITOR_COMMANDS, "delete", "rename"],
            **_EDITING,
            old_path="string",
            new_path="string",
        ),
    ),
}


def anthropic_tools(tools: list[Object]) -> tuple[list[Object], list[Object]]:
    """`Request.tools` and `Request.deferred_tools` of a body's tools. Raises WireError 400.

    Tools that Anthropic's servers run are left out with a warning, but refused if there are no
    others."""
    check_number(tools)
    declared: list[Object] = []
    deferred: list[Object] = []
    server_types: list[str] = []
    for number, tool in enumerate(tools):
        tool_type = str(tool.get("type") or "custom")
        if tool_type.startswith(_SERVER_TOOLS):
            server_types.append(tool_type)
            continue
        is_deferred = tool.get("defer_loading") is True
        if is_deferred and tool.get("input_schema") is None and not _client_tool(tool_type):
            continue  # a placeholder, which describes nothing
        form = _tool_form(tool, tool_type, f"tools.{number}")
        (deferred if is_deferred else declared).append(form)
    names = [tool["function"]["name"] for tool in declared + deferred]
    if len(set(names)) < len(names):
        raise WireError(400, "tools: Tool names must be unique.")
    if server_types and not names:
        message = "runs on Anthropic's servers and is not supported by this server"
        raise WireError(400, f"tools: '{server_types[0]}' {message}")
    if server_types:
        log.warning(
            "tools that only Anthropic's servers run were left out: %s", ", ".join(server_types)
        )
    if any(tool_type.startswith(_TOOL_SEARCH) for tool_type in server_types):
        # Without the search the model would never see a deferred tool
        return declared + deferred, []
    return declared, deferred


def _client_tool(tool_type: str) -> tuple[str, str, Object] | None:
    for prefix, description in _CLIENT_TOOLS.items():
        if tool_type.startswith(prefix):
            return description
    return None


def _tool_form(tool: Object, tool_type: str, path: str) -> Object:
    """One tool that the client runs, in OpenAI's form."""
    client_tool = _client_tool(tool_type)
    if tool.get("input_schema") is not None or tool_type == "custom":
        name = field(tool, "name", str, path, required=True)
        description = field(tool, "description", str, path, default="")
        schema: Object = field(tool, "input_schema", dict, path, required=True)
    elif client_tool:
        name, description, schema = client_tool
        name = field(tool, "name", str, path, default=name)
    else:
        message = f"tools of type '{tool_type}' are not supported by this server"
        raise WireError(400, f"{path}: {message}")
    if not name:
        raise WireError(400, f"{path}.name: String should have at least 1 character")
    return tool_form(name, description, schema)


def anthropic_tool_choice(choice: Object, tools: list[Object]) -> tuple[str, bool]:
    """`Request.tool_choice` and `Request.parallel_tool_calls`."""
    choice_type = choice.get("type", "auto")
    if choice_type not in ("auto", "any", "tool", "none"):
        raise WireError(400, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    tool_choice: str = choice_type
    if choice_type == "any":
        tool_choice = forced_choice("any", None, tools, "tool_choice")
    elif choice_type == "tool":
        name = field(choice, "name", str, "tool_choice", required=True)
        tool_choice = forced_choice("tool", name, tools, "tool_choice")
    not_parallel = field(choice, "disable_parallel_tool_use", bool, "tool_choice", default=False)
    return tool_choice, not not_parallel
