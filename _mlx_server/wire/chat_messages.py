"""The messages of a chat as OpenAI's chat completions and Ollama write them."""

from __future__ import annotations

from collections.abc import Callable

from _mlx_server.wire.conversation import Call, Turn
from _mlx_server.wire.documents import omitted, unknown
from _mlx_server.wire.fields import Object, field, items
from _mlx_server.wire.tools import call_arguments

CHAT_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
"""`Turn.role` by a message's role. All others are the user's."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def chat_turns(messages: list[Object], text_of: Callable[[Object, str], str]) -> list[Turn]:
    """The turns of a chat. `text_of` reads the text of a message at a path. Raises WireError 400.

    A result belongs to the call whose id it has, or else to the first call of its name that has no
    result yet, or else to the first call without a result."""
    turns: list[Turn] = []
    waiting: list[tuple[str, str]] = []  # (id, name) of the last calls that have no result yet
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        role = field(message, "role", str, path, required=True).lower()
        text = text_of(message, path)
        if role == "assistant":
            calls, notes = _past_calls(message, number)
            if not turns or turns[-1].role != "assistant":
                waiting = []
            waiting += [(id, name) for id, name, _ in calls]
            if not text and message.get("audio") is not None:
                notes.append(omitted(f"{path}.audio", "audio", "this model cannot hear"))
            text = "\n".join(filter(None, [text, *notes]))
            turns.append(Turn("assistant", text, _reasoning(message, path), calls))
        elif role in ("tool", "function"):
            call_id = _answered_call(message, path, waiting)
            turns.append(Turn("tool", text, call_id=call_id))
        else:
            turns.append(Turn(CHAT_ROLES.get(role, "user"), text))
    return turns


def _reasoning(message: Object, path: str) -> str:
    for key in _REASONING_KEYS:
        if reasoning := field(message, key, str, path):
            return reasoning
    return ""


def _past_calls(message: Object, number: int) -> tuple[list[Call], list[str]]:
    """The calls of an assistant's message, and notes in place of those of an unknown type. A call
    without an id gets one. Before there were lists of calls, a message had one `function_call`."""
    calls: list[Call] = []
    notes = []
    path = f"messages.{number}"
    past = items(message, "tool_calls", dict, path)
    if not past and (legacy := field(message, "function_call", dict, path)):
        past = [{"function": legacy}]
    for index, call in enumerate(past):
        call_path = f"{path}.tool_calls.{index}"
        call_type = field(call, "type", str, call_path, default="function")
        id = field(call, "id", str, call_path) or f"call_{number}_{index}"
        if call_type == "custom" and "function" not in call:
            custom = field(call, "custom", dict, call_path, required=True)
            name = field(custom, "name", str, f"{call_path}.custom", required=True)
            calls.append((id, name, {"input": custom.get("input")}))
        elif call_type == "function" or "function" in call:
            function = field(call, "function", dict, call_path, required=True)
            name = field(function, "name", str, f"{call_path}.function", required=True)
            calls.append((id, name, call_arguments(function.get("arguments"))))
        else:
            notes.append(unknown(call_path, call_type))
    return calls, notes


def _answered_call(message: Object, path: str, waiting: list[tuple[str, str]]) -> str:
    """The id of the call whose result a message is. Removes the call from `waiting`."""
    id, tool_name, name = (
        field(message, key, str, path) for key in ("tool_call_id", "tool_name", "name")
    )
    by_id = [call for call in waiting if call[0] == id]
    by_name = [call for call in waiting if call[1] in (tool_name, name)]
    found = next(iter([*by_id, *by_name, *waiting]), None)
    if found is None:
        return id or tool_name or name or "unknown"
    waiting.remove(found)
    return found[0]
