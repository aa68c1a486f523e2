"""From the turns that a dialect has read to the canonical conversation.

Its form is that of `protocol.Message`. It is append-only: when a client adds turns at the end, the
earlier messages stay as they were, so that the engine finds their tokens in its cache."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass

from _mlx_server.inference.protocol import Message, Request
from _mlx_server.wire.fields import Object, WireError

NO_RESULT = "[no result: interrupted]"
Call = tuple[str, str, Object]
"""A tool call: id, name, arguments."""


@dataclass
class Turn:
    """What one role said. `role` is "system", "user", "assistant" or "tool".

    `calls` are an assistant's tool calls. `call_id` is the id of the call
    whose result a tool's text is."""

    role: str
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)
    call_id: str = ""

    @property
    def has_content(self) -> bool:
        if self.role == "assistant":
            return bool(self.text.strip() or self.reasoning.strip() or self.calls)
        return bool(self.text) or self.role == "tool"


def require_content(turns: list[Turn], key: str = "messages") -> list[Turn]:
    """`turns`, which were read from the field `key`. Raises WireError 400 if all are empty."""
    if not any(turn.has_content for turn in turns):
        raise WireError(400, f"{key}: at least one message is required")
    return turns


def canonical(turns: Iterable[Turn]) -> list[Message]:
    """Turns in any order as the canonical conversation.

    When turns are added at the end, only the last run of turns between two of the assistant's may
    change, and that only if a system message is added to it."""
    turns = [turn for turn in turns if turn.has_content]
    if turns and turns[-1].role == "assistant" and not (turns[-1].text.strip() or turns[-1].calls):
        turns.pop()  # reasoning alone cannot be continued
    system = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": "\n\n".join(turn.text for turn in system)})
    calls: list[Object] = []  # of the last message, without results yet
    for is_assistant, group in itertools.groupby(
        turns[len(system) :], lambda turn: turn.role == "assistant"
    ):
        if is_assistant:
            messages.append(_assistant_message(list(group)))
            calls = messages[-1].get("tool_calls", [])
        else:
            messages += _messages_after_answer(calls, group)
            calls = []
    if calls:
        messages += _messages_after_answer(calls, [])
    elif messages and messages[-1]["role"] == "assistant":
        # Templates cannot continue after a blank
        messages[-1]["content"] = messages[-1]["content"].rstrip()
    return messages


def _assistant_message(turns: list[Turn]) -> Message:
    """Successive assistant turns as one message. In this form text after a call comes before it."""
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


def _messages_after_answer(calls: list[Object], turns: Iterable[Turn]) -> list[Message]:
    """The turns between two assistant messages: the results of `calls` in the order of the calls,
    then one user message. System messages before any words of the user's go to the end of the last
    result, or to the start of the user message if there are no calls."""
    results: dict[str, str] = {}
    others: list[Turn] = []
    call_ids = {call["id"] for call in calls}
    for turn in turns:
        if turn.role == "tool" and turn.call_id in call_ids:
            results[turn.call_id] = turn.text
        else:
            others.append(turn)
    reminders, texts = _fold_system(others)
    messages: list[Message] = [
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "name": call["function"]["name"],
            "content": results.get(call["id"], NO_RESULT),
        }
        for call in calls
    ]
    if messages and reminders:
        messages[-1]["content"] = "\n".join(filter(None, [messages[-1]["content"], *reminders]))
    else:
        texts = [*reminders, *texts]
    if texts:
        messages.append({"role": "user", "content": "\n".join(texts)})
    return messages


def _fold_system(turns: list[Turn]) -> tuple[list[str], list[str]]:
    """The system messages before the first words, then the words with each later system message
    right before the words that it follows.

    It does not go before all words of the run: an earlier request may have ended with the first of
    them, and its tokens are in the cache."""
    leading: list[str] = []
    texts: list[str] = []
    for turn in turns:
        if turn.role == "system":
            reminder = f"<system-reminder>\n{turn.text}\n</system-reminder>"
            if texts:
                texts.insert(-1, reminder)
            else:
                leading.append(reminder)
        elif turn.role == "user":
            texts.append(turn.text)
        else:
            texts.append(f"Tool result ({turn.call_id}): {turn.text}")
    return leading, texts


def ask_for_json(request: Request, schema: Object | None) -> None:
    """Makes the answer JSON: any object, or what matches `schema`. The engine enforces it. A
    sentence at the end of the last user message also tells the model."""
    request.format = "json" if schema is None else schema
    demand = f", matching this schema: {json.dumps(schema, ensure_ascii=False)}" if schema else "."
    demand = f"Answer with JSON only{demand}"
    for message in reversed(request.messages):
        if message["role"] == "user":
            message["content"] += f"\n\n{demand}"
            return
    request.messages.append({"role": "user", "content": demand})
