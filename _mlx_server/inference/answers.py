"""The memory of what a model wrote."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.protocol import Message

# A random part, since any text may stand in a conversation
_SECRET = secrets.token_hex(8)
PLACEHOLDER = re.compile(rf"\u2063{_SECRET} (\d+)\u2063")
"""What stands for an answer in a rendered prompt; the group is the message's index."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote in one turn: its tokens without the end token, the text after its
    thinking, and its thinking ("" if it did not think)."""

    tokens: list[int]
    visible: str
    thinking: str


class AnswerMemory:
    """Keeps the latest `most` answers of a model, to put their very tokens into later prompts.

    Clients rewrite tool inputs, templates format them in their own way, and text need not be
    tokenised as it was generated, but the KV cache is only good for the tokens that were generated.

    Thread-safe: answers never change, and the map they are in has its own lock."""

    def __init__(self, most: int):
        self._answers: BoundedMap[Answer] = BoundedMap(most)

    def learn(self, answers: Mapping[str, Answer]) -> None:
        """Remembers answers by their keys, and forgets the oldest ones."""
        for key, answer in answers.items():
            self._answers.put(key, answer)

    def get(self, key: str) -> Answer | None:
        """A remembered answer."""
        return self._answers.get(key)

    def insert_placeholders(
        self, messages: list[Message], excluded: Collection[int] = ()
    ) -> tuple[list[Message], dict[int, Answer]]:
        """The conversation with a placeholder for the text of each remembered answer, and these
        answers by the index of their message. Messages with an `excluded` index keep their text.

        Thinking that the client has left out is put back: the template decides whether to show
        it."""
        replaced, answers = list(messages), {}
        for at, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            call_ids = [call.get("id", "") for call in message.get("tool_calls") or []]
            question = messages[at - 1] if at else None
            answer = self.get(answer_key(call_ids, message["content"], question))
            if answer is None:
                continue
            if at not in excluded:
                answers[at] = answer
                message = {**message, "content": f"\u2063{_SECRET} {at}\u2063"}
            if answer.thinking and not message.get("reasoning_content"):
                message = {**message, "reasoning_content": answer.thinking}
            replaced[at] = message
        return replaced, answers


def answer_key(call_ids: list[str], text: str, question: Message | None) -> str:
    """Identifies an answer: by the ids of its calls, else by its text and the message before
    it."""
    if call_ids:
        return " ".join(call_ids)
    asked = question["content"] if question else ""
    return hashlib.sha256(f"{asked}\0{text.strip()}".encode()).hexdigest()
