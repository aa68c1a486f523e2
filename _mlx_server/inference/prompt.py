"""A rendered request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Prompt:
    """A rendered request. `tokens` are what the model reads.

    `root`, `turn` and `body` are token counts that later prompts are likely to share: the end of
    the system message and the tools, the beginning of the user's last message, and the end before
    the generation prompt. They are 0 where there is none. `opening` is text of the answer that the
    prompt already ends with (the opening tag of a forced tool call). `in_thinking` says that the
    prompt ends inside thinking.

    `key` names the conversation for `ConversationMemory`; it is "" for other prompts. Its first
    `known` tokens are those of the answer that is remembered as `answer`, if there is one."""

    tokens: list[int]
    root: int = 0
    turn: int = 0
    body: int = 0
    opening: str = ""
    in_thinking: bool = False
    key: str = ""
    answer: str = ""
    known: int = 0
