"""The control tokens of a tokenizer, and how text from outside is kept apart from them."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable
from typing import Any

from _mlx_server.inference.protocol import Message

SPLIT = str(10**23 + secrets.randbelow(10**24))
"""Stands within whatever is spelled like a control token but is text. It is random, so that no text
holds it by chance or by intent, and made of digits, which no template escapes, trims or changes."""

# Added tokens that are ordinary text unless the template writes them: blanks, words, HTML.
_ORDINARY = re.compile(r"[\s\w]*|</?[A-Za-z][A-Za-z0-9]*\s*/?>")


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and those added tokens that are
    markup, such as `<tool_call>`. `names` has their texts by their ids.

    `escape` makes text from outside safe to be put into a template: it puts SPLIT behind the first
    character of each text of a control token. Then neither the template nor the tokenizer can see
    a control token there. TextTokenizer removes SPLIT again. `wrapped` is mlx-lm's
    TokenizerWrapper. Thread-safe."""

    def __init__(self, wrapped: Any):
        template = getattr(wrapped, "chat_template", None)
        source = template if isinstance(template, str) else ""
        added = getattr(wrapped, "added_tokens_decoder", {})
        tags = (wrapped.think_start, wrapped.think_end) if wrapped.has_thinking else ()
        self.names = {
            id: token.content
            for id, token in added.items()
            if len(token.content.strip()) > 1
            and (
                token.special
                or token.content in source
                or token.content in tags
                or not _ORDINARY.fullmatch(token.content)
            )
        }
        texts = set(self.names.values())
        self._texts = tuple(texts)
        self._longest = max(map(len, texts), default=0)
        self._first_letter = re.compile(alternatives({text[0] for text in texts}))
        self._pattern = re.compile(alternatives(texts))
        self._thinking = tags if texts.issuperset(tags) else ()

    def escape(self, text: str) -> str:
        """Text from outside, in which no control token can be seen."""
        if not self._first_letter.search(text):
            return text
        starts = self._starts(text)
        return escape_at(text, starts)

    def escape_message(self, message: Message) -> Message:
        """A message whose texts are escaped: contents, thinking, names, ids, arguments.

        The thinking that the content of an assistant's message begins with keeps its tags, since
        templates look for them. Anywhere else the tags are text."""
        escaped = message
        for key, value in message.items():
            shown = self.escape_value(value)
            if shown is not value:
                escaped = {**escaped, key: shown}
        if message.get("role") == "assistant" and self._thinking:
            start, end = self._thinking
            blanks, opened, rest = message["content"].partition(start)
            if opened and not blanks.strip():
                thought, closed, rest = rest.partition(end)
                content = f"{blanks}{opened}{self.escape(thought)}{closed}{self.escape(rest)}"
                return {**escaped, "content": content}
        return escaped

    def escape_value(self, value: Any) -> Any:
        """A JSON value, such as a tool's definition, all of whose texts are escaped. Objects and
        lists are copied."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {self.escape(key): self.escape_value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escape_value(item) for item in value]
        return value

    def _starts(self, text: str) -> list[int]:
        """Where a control token's text begins: in `text`, or at its end if what a template puts
        behind it may complete the token."""
        starts = []
        found = self._pattern.search(text)
        while found:
            starts.append(found.start())
            found = self._pattern.search(text, found.start() + 1)
        end = len(text.rstrip())
        begun = self._first_letter.search(text, max(0, end - self._longest + 1), end)
        while begun:
            rest = text[begun.start() : end]
            if any(name.startswith(rest) for name in self._texts):
                starts.append(begun.start())
            begun = self._first_letter.search(text, begun.start() + 1, end)
        return sorted(set(starts))


def escape_at(text: str, starts: list[int]) -> str:
    """A text in which no control token can be seen at these places, in order."""
    if not starts:
        return text
    cuts = [0, *(start + 1 for start in starts), len(text)]
    return SPLIT.join(text[begin:end] for begin, end in itertools.pairwise(cuts))


def unescape(text: str) -> str:
    """What was escaped, as it was."""
    return text.replace(SPLIT, "")


def alternatives(texts: Iterable[str]) -> str:
    """A regular expression that matches any of these texts, the longest where several do; nothing
    if there are none. Texts that begin alike share their beginning in it, so that hundreds of them
    are found as fast as a few."""
    return _branches(set(filter(None, texts))) or "(?!)"


def _branches(texts: set[str]) -> str:
    rests: dict[str, set[str]] = {}
    for text in sorted(filter(None, texts)):
        rests.setdefault(text[0], set()).add(text[1:])
    branches = [re.escape(first) + _branches(behind) for first, behind in rests.items()]
    if "" in texts:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
