"""Renders conversations with a model's chat template."""

from __future__ import annotations

import bisect
import datetime
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.answers import PLACEHOLDER, Answer, AnswerMemory
from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.formats import OutputFormat
from _mlx_server.inference.prompt import Prompt
from _mlx_server.inference.protocol import InvalidRequest, Message, Request
from _mlx_server.inference.splicer import AnswerSplicer
from _mlx_server.inference.template import Template
from _mlx_server.inference.tokenizer import TextTokenizer

# For templates that do not know the finer ones
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}


@dataclass(frozen=True)
class _Rendering:
    """A conversation's text. Placeholders stand for `answers` in it and in `messages`."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    options: dict[str, Any]
    answers: dict[int, Answer]
    text: str


class ChatRenderer:
    """Renders and tokenises conversations with a model's chat template.

    Thread-safe: what is remembered between requests is in maps that have their own locks."""

    REMEMBERED = 4096  # conversations, and beginnings of an assistant's turn
    ROOTS = 32  # pairs of a system message and tools

    def __init__(
        self,
        template: Template,
        tokenizer: TextTokenizer,
        format: OutputFormat,
        memory: AnswerMemory,
        splicer: AnswerSplicer,
    ):
        self._template, self._tokenizer, self._format = template, tokenizer, format
        self._memory, self._splicer = memory, splicer
        self._roots: BoundedMap[int] = BoundedMap(self.ROOTS)
        self._openers: BoundedMap[str] = BoundedMap(self.REMEMBERED)
        self._births: BoundedMap[datetime.datetime] = BoundedMap(self.REMEMBERED)

    def prompt(self, request: Request) -> Prompt:
        """Renders and tokenises a conversation. Raises InvalidRequest when the template refuses
        it."""
        rendering = self._render(request)
        text = rendering.text
        opener = self._opener(rendering)
        chat = request.context + self._splicer.splice(text, rendering.answers, opener)
        opening = self._format.call_prefix(request.tool_choice) if rendering.tools else ""
        start = self._format.thinking[0] if self._format.thinking else ""
        return Prompt(
            chat + self._tokenizer.encode(opening),
            root=self._root(rendering, len(chat)),
            turn=self._turn(rendering, len(chat)),
            body=len(chat) - len(self._tokenizer.encode(opener)) if opener else 0,
            opening=opening,
            in_thinking=bool(start) and not opening and text.rstrip().endswith(start),
        )

    def locate(self, request: Request, before: str) -> tuple[int, str] | None:
        """The index and the role of the message in which the prompt's text goes beyond `before`;
        None where the template does not tell."""
        messages, tools = request.messages, _shown_tools(request)
        if not messages or request.context:
            return None
        options = self._options(request)

        def goes_beyond(index: int) -> bool:
            begun = messages[: index + 1]
            text = self._template.render(begun, tools, options, generation=False)
            return len(text) > len(before)

        try:
            at = bisect.bisect_left(range(len(messages) - 1), True, key=goes_beyond)
        except InvalidRequest:  # a conversation that ends there is none
            return None
        return at, messages[at]["role"]

    def _render(self, request: Request) -> _Rendering:
        tools, options = _shown_tools(request), self._options(request)
        # The template needs a result between two calls that were generated without one
        split = set() if self._template.traits.parallel_calls else _parallel_calls(request.messages)
        messages, answers = self._memory.insert_placeholders(request.messages, split)
        text = self._template.render(messages, tools, options, generation=True)
        # Templates may drop text beside calls, or not end turns with a token
        if lost := answers.keys() - self._splicer.replaceable(text):
            messages, answers = self._memory.insert_placeholders(request.messages, lost | split)
            text = self._template.render(messages, tools, options, generation=True)
        return _Rendering(messages, tools, options, answers, text)

    def _options(self, request: Request) -> dict[str, Any]:
        """What the template is told beside messages and tools."""
        template, effort = self._template, request.effort
        options: dict[str, Any] = {}
        if template.shows_dates:
            options["strftime_now"] = self._clock(request.messages)
        # A model that is to call a tool at once must not think first
        thinking = request.thinking if request.tool_choice in ("auto", "none") else False
        if thinking is not None:
            options["enable_thinking"] = thinking
        if effort and thinking is not False and template.mentions("reasoning_effort"):
            known = template.mentions(f"'{effort}'") or template.mentions(f'"{effort}"')
            options["reasoning_effort"] = effort if known else _EFFORTS.get(effort, effort)
        return options

    def _clock(self, messages: list[Message]) -> Callable[[str], str]:
        """What tells a template the date: that of the conversation's beginning. With a new date at
        its beginning, a whole prompt would have to be prefilled again at midnight."""
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
        key = hashlib.sha256(json.dumps(messages[: first + 1]).encode()).hexdigest()
        return self._births.get_or_make(key, datetime.datetime.now).strftime

    def _opener(self, rendering: _Rendering) -> str:
        """What the template puts behind the conversation to begin the assistant's turn; "" if it
        cannot be told. It is remembered by what it depends on: finding it means rendering the
        conversation once more."""
        messages, text = rendering.messages, rendering.text
        role = messages[-1]["role"] if messages else ""
        key = json.dumps([{**rendering.options, "strftime_now": 0}, bool(rendering.tools), role])
        known = self._openers.get(key)
        if known is not None and text.endswith(known):
            return known
        body = self._template.render(messages, rendering.tools, rendering.options, generation=False)
        opener = text[len(body) :] if text.startswith(body) else ""
        if opener:
            self._openers.put(key, opener)
        return opener

    def _root(self, rendering: _Rendering, length: int) -> int:
        """Token count of the system message and the tools, with which every conversation of a
        client begins; 0 if the prompt of `length` tokens has none."""
        head = [message for message in rendering.messages[:1] if message["role"] == "system"]
        tools, options = rendering.tools, rendering.options
        if not head and not tools:
            return 0

        def measure() -> int:
            one, two = (
                self._template.render(
                    [*head, {"role": "user", "content": content}], tools, options, generation=False
                )
                for content in "xy"
            )
            shared = os.path.commonprefix([one, two])
            return len(self._tokenizer.encode(shared)) if rendering.text.startswith(shared) else 0

        key = json.dumps([head, tools, options], ensure_ascii=False, default=repr)
        try:
            root = self._roots.get_or_make(key, measure)
        except InvalidRequest:
            return 0
        return root if root < length else 0

    def _turn(self, rendering: _Rendering, length: int) -> int:
        """Token count before what the user says last, in a prompt of `length` tokens; 0 unless it
        is the last message."""
        messages, text = rendering.messages, rendering.text
        if not messages or messages[-1]["role"] != "user":
            return 0
        at = max(0, text.rfind(messages[-1]["content"].strip()))
        cut = self._tokenizer.last_special_token_end(text, max(0, at - 200), at)
        if cut is None or PLACEHOLDER.search(text, cut):
            return 0
        return max(0, length - len(self._tokenizer.encode(text[cut:])))


def _shown_tools(request: Request) -> list[dict[str, Any]]:
    return request.tools if request.tool_choice != "none" else []


def _parallel_calls(messages: list[Message]) -> set[int]:
    """The indices of messages with several calls."""
    return {at for at, one in enumerate(messages) if len(one.get("tool_calls") or []) > 1}
