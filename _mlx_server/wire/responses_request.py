"""The input and the tools of a responses body:
https://platform.openai.com/docs/api-reference/responses/create"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from _mlx_server.wire.chat_messages import CHAT_ROLES
from _mlx_server.wire.conversation import Turn
from _mlx_server.wire.documents import elsewhere, unknown
from _mlx_server.wire.fields import Object, field, items
from _mlx_server.wire.images import Images
from _mlx_server.wire.openai_request import openai_text
from _mlx_server.wire.tools import PastArguments

log = logging.getLogger("mlx_server")

_FREE_TEXT = {  # what the model sees of the input of a custom tool
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}

# Items that say nothing to the model
_SILENT = (
    "additional_tools",
    "compaction_trigger",
    "configuration_update",
    "mcp_list_tools",
    "tool_search_output",
)


@dataclass
class ResponsesTools:
    """The tools of a body as the model sees them.

    `tools` has those of namespaces in one list with the others. `namespaces` is the namespace and
    the name there by the name in `tools`. `custom` are the names of tools whose input is free
    text."""

    tools: list[Object] = dataclass_field(default_factory=list)
    namespaces: dict[str, tuple[str, str]] = dataclass_field(default_factory=dict)
    custom: set[str] = dataclass_field(default_factory=set)

    def add(self, tool: Object, path: str, namespace: str | None = None) -> None:
        """Adds the tool at `path`. Raises WireError 400."""
        is_custom = tool.get("type") == "custom"
        if namespace is not None:
            name = field(tool, "name", str, path, required=True)
            tool = {**tool, "name": name_in(namespace, name)}
            self.namespaces[tool["name"]] = (namespace, name)
        if is_custom:
            tool = _custom_as_function(tool, path)
            self.custom.add(tool["name"])
        self.tools.append(tool)


def responses_tools(tools: list[Object]) -> ResponsesTools:
    """The tools of a body, namespaces resolved. Raises WireError 400."""
    result = ResponsesTools()
    for number, tool in enumerate(tools):
        path = f"tools.{number}"
        if tool.get("type") != "namespace":
            result.add(tool, path)
            continue
        namespace = field(tool, "name", str, path, required=True)
        for inner in items(tool, "tools", dict, path):
            result.add(inner, f"{path}.tools", namespace)
    return result


def _custom_as_function(tool: Object, path: str) -> Object:
    """A custom tool as a function with one string. Its grammar is put into the description and not
    enforced."""
    tool_format = field(tool, "format", dict, path, default={})
    description = field(tool, "description", str, path, default="")
    grammar = field(tool_format, "definition", str, f"{path}.format", default="")
    return {
        "type": "function",
        "name": field(tool, "name", str, path, required=True),
        "description": "\n\n".join(filter(None, [description, grammar])),
        "parameters": _FREE_TEXT,
    }


def name_in(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{namespace}__{name}" if namespace else name


def responses_turns(body: Object, images: Images) -> list[Turn]:
    """The turns of `input`: a text, or items of which several may belong to one turn of the
    assistant. Its images go to `images`. Raises WireError 400."""
    if isinstance(body.get("input"), str):
        return [Turn("user", body["input"])]
    turns, arguments = [], PastArguments()
    for number, item in enumerate(items(body, "input", dict, required=True)):
        turn = _item_turn(item, f"input.{number}", images, arguments)
        if turn:
            turns.append(turn)
    return turns


def _item_turn(item: Object, path: str, images: Images, arguments: PastArguments) -> Turn | None:
    """An item as a turn, None if it has no meaning here."""
    is_reference = "role" not in item and "content" not in item  # if it says no type
    default_type = "item_reference" if is_reference else "message"
    item_type = field(item, "type", str, path, default=default_type)
    match item_type:
        case "message":
            role = field(item, "role", str, path, required=True)
            return Turn(CHAT_ROLES.get(role, "user"), openai_text(item, path, images=images))
        case "function_call" | "custom_tool_call":
            return _call_turn(item, item_type, path, arguments)
        case "local_shell_call":
            action = field(item, "action", dict, path, required=True)
            id = _call_id(item, path)
            return Turn("assistant", calls=[(id, "local_shell", action)])
        case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
            text = openai_text(item, path, "output", images=images)
            return Turn("tool", text, call_id=_answered_call(item, path))
        case "reasoning":
            texts = [openai_text(item, path, key, images=images) for key in ("content", "summary")]
            return Turn("assistant", reasoning=texts[0] or texts[1])
        case "item_reference":
            id = field(item, "id", str, path, required=True)
            return Turn("user", elsewhere(path, "item", id))
    if item_type in _SILENT:
        log.info("%s: left out an item of type %s", path, item_type)
        return None
    # The assistant's calls may stand between others of its calls, whose results follow later
    role = "assistant" if item_type.endswith("_call") else "user"
    return Turn(role, unknown(path, item_type))


def _call_turn(item: Object, item_type: str, path: str, past: PastArguments) -> Turn:
    id = field(item, "call_id", str, path, required=True)
    name = field(item, "name", str, path, required=True)
    if item_type == "custom_tool_call":
        arguments = {"input": field(item, "input", str, path, default="")}
    else:
        arguments = past.read(item.get("arguments"), path)
    namespace = field(item, "namespace", str, path)
    return Turn("assistant", calls=[(id, name_in(namespace, name), arguments)])


def _call_id(item: Object, path: str) -> str:
    """The id of a call of the local shell, which may have it in `id` instead of `call_id`."""
    key = "id" if item.get("call_id") is None else "call_id"
    return field(item, key, str, path, required=True)


def _answered_call(item: Object, path: str) -> str:
    """The id of the call that an item answers. A result that comes without a call has none, but the
    name of a tool or an id of its own."""
    ids = [field(item, key, str, path) for key in ("call_id", "id", "name")]
    return next(filter(None, ids), "unknown")
