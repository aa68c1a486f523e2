"""The one way into the canonical conversation."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from _mlx_server.inference.protocol import Message, Request
from _mlx_server.wire.fields import Object, WireError, field, items
from _mlx_server.wire.tools import call_arguments

IMAGE_NOTE = "[image omitted: this model cannot see images]"
NO_RESULT = "[no result: interrupted]"


@dataclass
class Turn:
    """One thing somebody said, as a dialect found it. `role` is "system", "user", "assistant" or
    "tool".

    `calls` are an assistant's (id, name, arguments); `call_id` says which of them a tool's text
    answers."""

    role: str
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, Object]] = dataclasses.field(default_factory=list)
    call_id: str = ""

    @property
    def says_something(self) -> bool:
        if self.role == "assistant":
            return bool(self.text.strip() or self.reasoning.strip() or self.calls)
        return bool(self.text) or self.role == "tool"


def require_content(turns: list[Turn], key: str = "messages") -> list[Turn]:
    """The turns found at `key`. Raises WireError if nothing is said in them."""
    if not any(turn.says_something for turn in turns):
        raise WireError(400, f"{key}: at least one message is required")
    return turns


def canonical(turns: Iterable[Turn]) -> list[Message]:
    """Turns in any order and number as the canonical conversation that the engine renders.

    It is append-only: when turns are added at the end, nothing changes but the last run of turns
    between two of the assistant's, and that only by what a system message after it brings along.
    """
    turns = [turn for turn in turns if turn.says_something]
    if turns and turns[-1].role == "assistant" and not (turns[-1].text.strip() or turns[-1].calls):
        turns.pop()  # nothing there to continue
    head = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    messages: list[Message] = []
    if head:
        messages.append({"role": "system", "content": "\n\n".join(turn.text for turn in head)})
    calls: list[Object] = []
    for spoken, group in itertools.groupby(
        turns[len(head) :], lambda turn: turn.role == "assistant"
    ):
        if spoken:
            messages.append(_answer(list(group)))
            calls = messages[-1].get("tool_calls", [])
        else:
            messages += _between(calls, group)
            calls = []
    if calls:
        messages += _between(calls, [])
    elif messages and messages[-1]["role"] == "assistant":
        # Templates cannot continue after a blank
        messages[-1]["content"] = messages[-1]["content"].rstrip()
    return messages


def _answer(turns: list[Turn]) -> Message:
    """Successive assistant turns as one message; what was said after a call comes before it."""
    message: Message = {
        "role": "assistant",
        "content": "\n".join(turn.text for turn in turns if turn.text.strip()),
    }
    if reasoning := "\n".join(turn.reasoning for turn in turns if turn.reasoning.strip()):
        message["reasoning_content"] = reasoning
    if calls := [call for turn in turns for call in turn.calls]:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in calls
        ]
    return message


def _between(calls: list[Object], turns: Iterable[Turn]) -> list[Message]:
    """What stands between two assistant messages: the results of `calls` in their order, then the
    user's words.

    A system message becomes a reminder right before the words of the one user message it follows,
    not at the head of several: an earlier request may have ended in those and has been prefilled
    like that. Without words before it, it ends the last result, or, after a plain answer, opens the
    next user message."""
    results: dict[str, str] = {}
    reminders: list[str] = []
    words: list[str] = []
    last_words: int | None = None
    open_ids = {call["id"] for call in calls}
    for turn in turns:
        if turn.role == "tool" and turn.call_id in open_ids:
            results[turn.call_id] = turn.text
        elif turn.role != "system":
            last_words = len(words)
            words.append(
                turn.text if turn.role == "user" else f"Tool result ({turn.call_id}): {turn.text}"
            )
        else:
            reminder = f"<system-reminder>\n{turn.text}\n</system-reminder>"
            if last_words is not None:
                words.insert(last_words, reminder)
                last_words += 1
            else:
                (reminders if calls else words).append(reminder)
    messages: list[Message] = [
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "name": call["function"]["name"],
            "content": results.get(call["id"], NO_RESULT),
        }
        for call in calls
    ]
    if reminders:
        messages[-1]["content"] = "\n".join([*filter(None, [messages[-1]["content"]]), *reminders])
    if words:
        messages.append({"role": "user", "content": "\n".join(words)})
    return messages


def chat_turns(messages: list[Object], text_of: Callable[[Object, str], str]) -> list[Turn]:
    """The turns of a chat of OpenAI's or Ollama's; `text_of` reads a message's content. A result
    without an id belongs to the first open call of its name, or else to the first."""
    turns: list[Turn] = []
    waiting: list[tuple[str, str]] = []  # (id, name) of the last calls, while they have no result
    for number, message in enumerate(messages):
        path = f"messages.{number}."
        role, text = (
            field(message, "role", str, path, required=True).lower(),
            text_of(message, path),
        )
        if role == "assistant":
            calls = list(_past_calls(message, number))
            follows = turns and turns[-1].role == "assistant"
            waiting = [*(waiting if follows else []), *((id, name) for id, name, _ in calls)]
            thoughts = (
                field(message, key, str, path)
                for key in ("reasoning_content", "reasoning", "thinking")
            )
            turns.append(Turn("assistant", text, next(filter(None, thoughts), ""), calls))
        elif role in ("tool", "function"):
            id, *names = (
                field(message, key, str, path) for key in ("tool_call_id", "tool_name", "name")
            )
            by_id = [call for call in waiting if call[0] == id]
            by_name = [call for call in waiting if call[1] in names]
            found = next(iter([*by_id, *by_name, *waiting]), None)
            if found:
                waiting.remove(found)
            turns.append(
                Turn(
                    "tool",
                    text,
                    call_id=found[0] if found else next(filter(None, [id, *names]), "unknown"),
                )
            )
        else:
            turns.append(Turn(CHAT_ROLES.get(role, "user"), text))
    return turns


# All others are the user's
CHAT_ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}


def _past_calls(message: Object, number: int) -> Iterable[tuple[str, str, Object]]:
    """The calls of an assistant's message; those without ids get one."""
    path = f"messages.{number}."
    for place, call in enumerate(items(message, "tool_calls", dict, path)):
        at = f"{path}tool_calls.{place}."
        function = field(call, "function", dict, at, required=True)
        name = field(function, "name", str, f"{at}function.", required=True)
        yield (
            field(call, "id", str, at) or f"call_{number}_{place}",
            name,
            call_arguments(function.get("arguments")),
        )


def ask_for_json(request: Request, schema: Object | None) -> None:
    """Demands an answer in JSON, of any object or of what matches a schema. The engine sees to it;
    the words at the end of the last user message let the model know beforehand."""
    request.format = "json" if schema is None else schema
    demand = f", matching this schema: {json.dumps(schema, ensure_ascii=False)}" if schema else "."
    demand = f"Answer with JSON only{demand}"
    for message in reversed(request.messages):
        if message["role"] == "user":
            message["content"] += f"\n\n{demand}"
            return
    request.messages.append({"role": "user", "content": demand})
