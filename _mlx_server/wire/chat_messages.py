"""The messages of a chat as OpenAI's chat completions and Ollama write them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from _mlx_server.wire.conversation import Call, Turn
from _mlx_server.wire.documents import omitted, unknown
from _mlx_server.wire.fields import Object, field, items
from _mlx_server.wire.tools import PastArguments

CHAT_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}
"""`Turn.role` by a message's role. All others are the user's."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def chat_turns(messages: list[Object], text_of: Callable[[Object, str], str]) -> list[Turn]:
    """The turns of a chat. `text_of` reads the text of a message at a path. Raises WireError 400.

    A result belongs to the call whose id it has, or else to the first call of its name that has no
    result yet, or else to the first call without a result."""
    turns: list[Turn] = []
    waiting, arguments = _Waiting(), PastArguments()
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        role = field(message, "role", str, path, required=True).lower()
        text = text_of(message, path)
        if role == "assistant":
            calls, notes = _past_calls(message, number, arguments)
            if not turns or turns[-1].role != "assistant":
                waiting = _Waiting()
            waiting.add(calls)
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


def _past_calls(
    message: Object, number: int, arguments: PastArguments
) -> tuple[list[Call], list[str]]:
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
            custom_path = f"{call_path}.custom"
            name = field(custom, "name", str, custom_path, required=True)
            text = field(custom, "input", str, custom_path, default="")
            calls.append((id, name, {"input": text}))
        elif call_type == "function" or "function" in call:
            function = field(call, "function", dict, call_path, required=True)
            name = field(function, "name", str, f"{call_path}.function", required=True)
            calls.append((id, name, arguments.read(function.get("arguments"), call_path)))
        else:
            notes.append(unknown(call_path, call_type))
    return calls, notes


_ANY = "any", ""


class _Waiting:
    """The last calls that have no result yet. A result takes its call away at the cost of one,
    however many there are."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}  # by their numbers
        self._numbers: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)
        self._count = 0

    def add(self, calls: list[Call]) -> None:
        for call in calls:
            id, name, _ = call
            self._calls[self._count] = call
            for kind in (("id", id), ("name", name), _ANY):
                self._numbers[kind].append(self._count)
            self._count += 1

    def take(self, id: str | None, *names: str | None) -> str | None:
        """The id of the first call with this id, or else with one of the names, or else of all;
        None if there is none."""
        number = self._first("id", id)
        if number is None:
            named = (self._first("name", name) for name in names)
            number = min((one for one in named if one is not None), default=None)
        if number is None:
            number = self._first(*_ANY)
        return None if number is None else self._calls.pop(number)[0]

    def _first(self, kind: str, text: str | None) -> int | None:
        numbers = self._numbers.get((kind, text)) if text is not None else None
        while numbers and numbers[0] not in self._calls:
            numbers.popleft()
        return numbers[0] if numbers else None


def _answered_call(message: Object, path: str, waiting: _Waiting) -> str:
    """The id of the call whose result a message is, which waits no more."""
    id, tool_name, name = (
        field(message, key, str, path) for key in ("tool_call_id", "tool_name", "name")
    )
    return waiting.take(id, tool_name, name) or id or tool_name or name or "unknown"
