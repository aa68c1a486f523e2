"""Renders conversations with a model's chat template."""

from __future__ import annotations

import bisect
import contextlib
import datetime
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.bounded import BoundedMap, text_bytes, value_bytes
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.prompt.control_tokens import alternatives, unescape
from _mlx_server.inference.prompt.conversations import (
    Call,
    ConversationMemory,
    KnownMessage,
    Reading,
    answer_names,
    message_calls,
)
from _mlx_server.inference.prompt.history import HistoryMemo, exact_bytes
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.prompt.template import Template
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import InvalidRequest, Message, PromptTooLong, Request

# For templates that do not know the finer ones
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}

# Stands in a message to find its end in the rendered text. Random: any text may be in a message.
_MARK = f"mark{secrets.token_hex(8)}"


@dataclass(frozen=True)
class _Root:
    """The system message and the tools, with which every conversation of a client begins: what
    finds it again, the tools as the template is given them, the key that both give to
    `ConversationMemory`, their token count (0 if there are none), and the bytes of all this."""

    digest: str
    tools: list[dict[str, Any]]
    key: str
    length: int
    size: int


@dataclass(frozen=True)
class _Chat:
    """A conversation on its way to a prompt: the escaped messages and tools, the rest of what the
    template is given, and the key behind each message of `history`, which is all messages that are
    complete, as they came."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    options: dict[str, Any]
    history: list[Message]
    keys: list[str]


@dataclass(frozen=True)
class _Match:
    """What was read of a conversation up to the message with this index: its tokens, and the text
    that the template renders behind them, within the text of the whole conversation. `known` is the
    number of these tokens: those of the rest are put behind them in the same list."""

    index: int
    known: int
    tokens: list[int]
    text: str
    rest: str


class ChatRenderer:
    """Renders and tokenises conversations with a model's chat template.

    A conversation that only grew takes the tokens that it was read as (`ConversationMemory`), and
    only what is new is rendered. So the model's thinking stays, also where the template would drop
    it from history. That costs context: when a prompt comes near the window, or the client wants
    old thinking to go, the conversation is rendered anew, and what is read then is what stays.

    Thread-safe: what is remembered between requests is in maps that have their own locks."""

    REMEMBERED = 4096  # beginnings of conversations
    MARKUP = 2**20  # bytes of the template's texts that begin or end turns, of each kind
    ROOTS = 4 * 2**20  # bytes of tools, and of what is known of system messages
    ROOT = 1000  # bytes that this takes beside the tools
    TEXTS = 8 * 2**20  # bytes of rendered texts, and as many of thinking
    FULL = 0.75  # of the window: a longer prompt gives up old thinking

    def __init__(
        self,
        template: Template,
        tokenizer: TextTokenizer,
        format: OutputFormat,
        memory: ConversationMemory,
    ):
        self._template, self._tokenizer, self._format = template, tokenizer, format
        self._memory = memory
        self._turn_end = _turn_end(tokenizer, format)
        self._roots: BoundedMap[_Root] = BoundedMap(self.ROOTS, lambda key, root: root.size)
        self._openers: BoundedMap[str] = BoundedMap(self.MARKUP, text_bytes)
        self._histories = HistoryMemo(template.escape_message)
        self._births: BoundedMap[datetime.datetime] = BoundedMap(self.REMEMBERED)
        # The ends of messages, by their keys
        self._ends: BoundedMap[str] = BoundedMap(self.MARKUP, text_bytes)
        # Escaped, by the id of a call
        self._thoughts: BoundedMap[str] = BoundedMap(self.TEXTS, text_bytes)
        # Of conversations without an answer that was generated here, by their keys
        self._texts: BoundedMap[str] = BoundedMap(self.TEXTS, text_bytes)

    def prompt(self, request: Request, window: int | None, most: float) -> Prompt:
        """Renders and tokenises a conversation. `window` is how many tokens prompt and answer may
        have. Raises InvalidRequest when the template refuses it, and PromptTooLong if it has more
        than `most` tokens; nothing is kept of what was rendered then."""
        with self._template.on_trial():
            return self._read(request, window, most)

    def _read(self, request: Request, window: int | None, most: float) -> Prompt:
        options = self._options(request)
        root = self._root(request.messages, _shown_tools(request), options, most)
        history = request.messages
        if history and _is_open(history[-1]):
            history = history[:-1]
        known = self._histories.prepare(request.messages)
        keys = self._memory.follow(root.key, known.messages[: len(history)])
        messages = self._with_thoughts(known.messages)
        chat = _Chat(messages, root.tools, options, history, keys)
        match = self._match(chat)
        if match is None or self._gives_up_thinking(request, chat, match, window):
            text = self._render(chat)
            match = _Match(-1, 0, [], text, text)
        tokens = match.tokens
        tokens += self._tokenizer.encode(match.rest, most - match.known)
        if len(tokens) > most:
            raise PromptTooLong(len(tokens), int(most))
        # Now it is certain that the conversation can be read
        self._roots.put(root.digest, root)
        self._histories.keep(known)
        return self._prompt(request, chat, root, match)

    def _prompt(self, request: Request, chat: _Chat, root: _Root, match: _Match) -> Prompt:
        tokens = match.tokens
        opener = self._opener(chat, match.text)
        body = len(tokens) - len(self._tokenizer.encode(opener)) if opener else 0
        if body and len(chat.keys) == len(chat.messages) and not request.context:
            self._remember_body(chat, root, match, tokens[match.known : body], opener)
        length = len(tokens)
        turn = self._turn(chat, match.text, length)
        opening = self._format.call_prefix(request.tool_choice) if chat.tools else ""
        start = self._format.thinking[0] if self._format.thinking else ""
        answered = match.index >= 0 and chat.messages[match.index]["role"] == "assistant"
        before = len(request.context)
        tokens += self._tokenizer.encode(opening)
        return Prompt(
            request.context + tokens if request.context else tokens,
            root=before + root.length if root.length < length and root.length else 0,
            turn=before + turn if turn else 0,
            body=before + body if body else 0,
            opening=opening,
            in_thinking=bool(start) and not opening and match.text.rstrip().endswith(start),
            key=(chat.keys[-1] if chat.keys else root.key) if not request.context else "",
            answer=chat.keys[match.index] if answered else "",
            known=match.known if answered else 0,
        )

    # -- what was read before

    def remember(
        self,
        request: Request,
        prompt: Prompt,
        tokens: list[int],
        visible: str,
        thinking: str,
        calls: list[Call],
    ) -> str:
        """Keeps what was read and generated for a request: all its `tokens`, and of the answer the
        visible text, the thinking and the calls. Returns the key, "" if nothing is kept."""
        if not prompt.key:
            return ""
        for id, _, _ in calls[:1] if thinking else []:
            self._thoughts.put(id, self._template.escape(thinking))
        if tokens and tokens[-1] in self._tokenizer.end_tokens:
            tokens = tokens[:-1]
        begun = request.messages[-1]["content"] if _is_open(request.messages[-1]) else ""
        names = answer_names(prompt.key, begun + visible, thinking, calls)
        key = names[0]
        before = self._memory.get(prompt.answer) if prompt.answer else None
        known, answer = (prompt.known, prompt.answer) if before else (0, "")
        thoughtful = bool(thinking) or before is not None and before.thoughtful
        reading = Reading(answer, tokens[known:], dict.fromkeys(names, key), thoughtful)
        self._memory.learn({key: reading})
        return key

    def _remember_body(
        self, chat: _Chat, root: _Root, match: _Match, tokens: list[int], opener: str
    ) -> None:
        """Keeps the `tokens` that are read behind a match and before the answer, which begins with
        `opener`."""
        if match.index == len(chat.keys) - 1:
            return
        before = chat.keys[match.index] if match.index >= 0 else ""
        known = self._memory.get(before) if before else None
        thoughtful = known is not None and known.thoughtful
        names: dict[str, str] = {}  # of answers that were not generated here
        for index in range(match.index + 1, len(chat.history)):
            message = chat.history[index]
            if message["role"] == "assistant":
                thinking = message.get("reasoning_content", "")
                thoughtful = (
                    thoughtful
                    or bool(thinking)
                    and self._template.escape(thinking.strip()) in match.text
                )
                start = chat.keys[index - 1] if index else root.key
                found = answer_names(start, message["content"], thinking, message_calls(message))
                names |= dict.fromkeys(found, chat.keys[index])
        reading = Reading(before, tokens, names, thoughtful)
        self._memory.learn({chat.keys[-1]: reading})
        if _MARK not in match.text:
            self._texts.put(chat.keys[-1], match.text[: len(match.text) - len(opener)])

    def _match(self, chat: _Chat) -> _Match | None:
        """The most that was read of a conversation, as far as the rest can be rendered behind
        it."""
        for index in range(len(chat.history) - 1, -1, -1):
            tokens = self._memory.tokens(chat.keys[index])
            if tokens is None:
                continue
            answered = chat.messages[index]["role"] == "assistant"
            found = self._behind_answer(chat, index) if answered else self._behind(chat, index)
            if found is not None:
                return _Match(index, len(tokens), tokens, *found)
        return None

    def _behind_answer(self, chat: _Chat, index: int) -> tuple[str, str] | None:
        """The conversation's text, in which a mark stands for the answer with this index, and what
        follows the answer, beginning with the end of its turn; None if the template does not
        show where that is."""
        message = chat.messages[index]
        calls = message.get("tool_calls") or []
        if len(calls) > 1 and not self._template.traits.parallel_calls:
            return None  # the template needs a result between two calls that had none
        marked = {**message, "content": _MARK}
        if calls:  # some templates drop text beside calls
            last = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {"a": _MARK}}}
            marked["tool_calls"] = [*calls[:-1], last]
        text = self._render(chat, index, marked)
        at = text.rfind(_MARK)
        end = self._turn_end.search(text, at + len(_MARK)) if at >= 0 else None
        return (text, text[end.start() :]) if end else None

    def _behind(self, chat: _Chat, index: int) -> tuple[str, str] | None:
        """The conversation's text, and what of it follows the turn of a message that is no answer;
        None if the template closes the turn in another way when the conversation goes on."""
        known = self._texts.get(chat.keys[index])
        if known is not None:
            text = self._render(chat)
            if text.startswith(known):
                return text, text[len(known) :]
        message = chat.messages[index]
        marked = {**message, "content": message["content"] + _MARK}

        def end_alone() -> str:
            begun = [*chat.messages[:index], marked]
            alone = self._template.render(begun, chat.tools, chat.options, generation=False)
            return alone.rpartition(_MARK)[2]

        end = self._ends.get_or_make(chat.keys[index], end_alone)
        before, found, behind = self._render(chat, index, marked).rpartition(_MARK)
        if not found or not behind.startswith(end):
            return None
        return before + behind, behind[len(end) :]

    def _gives_up_thinking(
        self, request: Request, chat: _Chat, match: _Match, window: int | None
    ) -> bool:
        """Whether the template's own form is to be read, which may leave out old thinking."""
        reading = self._memory.get(chat.keys[match.index])
        if reading is None or not reading.thoughtful:
            return False
        if request.keep_thinking is False or request.thinking is False:
            return True
        if window is None:
            return False
        length = match.known + len(self._tokenizer.encode(match.rest, window))
        if length <= window * self.FULL:
            return False
        return len(self._tokenizer.encode(self._render(chat), window)) < length

    def _with_thoughts(self, known: list[KnownMessage]) -> list[Message]:
        """The conversation, escaped, with the thinking before calls where the client has left it
        out: the template decides whether to show it."""
        shown = [one.escaped for one in known]
        for at, one in enumerate(known):
            calls = one.message.get("tool_calls") or []
            if not calls or one.message.get("reasoning_content"):
                continue
            if thinking := self._thoughts.get(calls[0].get("id", "")):
                shown[at] = {**one.escaped, "reasoning_content": thinking}
        return shown

    # -- the template

    def locate(self, request: Request, before: str) -> tuple[int, str] | None:
        """The index and the role of the message in which the prompt's text goes beyond `before`;
        None where the template does not tell."""
        messages, tools = request.messages, self._template.escape_tools(_shown_tools(request))
        if not messages or request.context:
            return None
        options = self._options(request)

        def goes_beyond(index: int) -> bool:
            begun = self._template.escape_messages(messages[: index + 1])
            text = self._template.render(begun, tools, options, generation=False)
            return len(unescape(self._tokenizer.without_images(text))) > len(before)

        try:
            at = bisect.bisect_left(range(len(messages) - 1), True, key=goes_beyond)
        except InvalidRequest:  # a conversation that ends there is none
            return None
        return at, messages[at]["role"]

    def _render(self, chat: _Chat, index: int = 0, marked: Message | None = None) -> str:
        """The conversation's text, with `marked` in place of the message with this index."""
        messages = list(chat.messages)
        if marked is not None:
            messages[index] = marked
        return self._template.render(messages, chat.tools, chat.options, generation=True)

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
        # So that a conversation that is read for the first time is read as a growing one is
        if request.keep_thinking and template.mentions("preserve_thinking"):
            options["preserve_thinking"] = True
        if effort and thinking is not False and template.mentions("reasoning_effort"):
            known = template.mentions(f"'{effort}'") or template.mentions(f'"{effort}"')
            options["reasoning_effort"] = effort if known else _EFFORTS.get(effort, effort)
        return options

    def _clock(self, messages: list[Message]) -> Callable[[str], str]:
        """What tells a template the date: that of the conversation's beginning. With a new date at
        its beginning, a whole prompt would have to be prefilled again at midnight."""
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
        key = hashlib.sha256(exact_bytes(messages[: first + 1])).hexdigest()
        return self._births.get_or_make(key, datetime.datetime.now).strftime

    def _opener(self, chat: _Chat, text: str) -> str:
        """What the template puts behind the conversation to begin the assistant's turn; "" if it
        cannot be told. It is remembered by what it depends on: finding it means rendering the
        conversation once more."""
        role = chat.messages[-1]["role"] if chat.messages else ""
        key = json.dumps([{**chat.options, "strftime_now": 0}, bool(chat.tools), role])
        known = self._openers.get(key)
        if known is not None and text.endswith(known):
            return known
        text, messages = self._render(chat), chat.messages
        body = self._template.render(messages, chat.tools, chat.options, generation=False)
        opener = text[len(body) :] if text.startswith(body) else ""
        if opener:
            self._openers.put(key, opener)
        return opener

    def _root(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: dict[str, Any],
        most: float,
    ) -> _Root:
        """What a conversation begins with, kept or to be kept; beyond `most` tokens it need not be
        measured. It is measured on two conversations that share no more than that, and so holds
        what the options change at the beginning, and no more."""
        head = [message for message in messages[:1] if message["role"] == "system"]
        begun = exact_bytes([head, tools]) + json.dumps(options, default=repr).encode()
        digest = hashlib.sha256(begun).hexdigest()[:32]
        if known := self._roots.get(digest):
            return known
        shown, first = self._template.escape_tools(tools), self._template.escape_messages(head)
        key, length = digest, 0
        with contextlib.suppress(InvalidRequest):
            one, two = (
                self._template.render(
                    [*first, {"role": "user", "content": text}], shown, options, generation=False
                )
                for text in "xy"
            )
            shared = os.path.commonprefix([one, two])
            key = hashlib.sha256(shared.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            length = len(self._tokenizer.encode(shared, most)) if head or tools else 0
        return _Root(digest, shown, key, length, self.ROOT + value_bytes(shown))

    def _turn(self, chat: _Chat, text: str, length: int) -> int:
        """Token count before what the user says last, in a prompt of `length` tokens; 0 unless it
        is the last message."""
        messages = chat.messages
        if not messages or messages[-1]["role"] != "user":
            return 0
        at = max(0, text.rfind(messages[-1]["content"].strip()))
        cut = self._tokenizer.last_special_token_end(text, max(0, at - 200), at)
        if cut is None or _MARK in text[cut:]:
            return 0
        return max(0, length - len(self._tokenizer.encode(text[cut:])))


def _shown_tools(request: Request) -> list[dict[str, Any]]:
    return request.tools if request.tool_choice != "none" else []


def _is_open(message: Message) -> bool:
    """Whether the answer is to continue this last message."""
    return bool(message["role"] == "assistant" and not message.get("tool_calls"))


def _turn_end(tokenizer: TextTokenizer, format: OutputFormat) -> re.Pattern[str]:
    """Matches where an answer ends in a rendered text: at an end token, or at the end of thinking
    where that ends the turn, too."""
    ends = alternatives(filter(None, (tokenizer.decode([end]) for end in tokenizer.end_tokens)))
    thinking_end = format.thinking[1] if format.thinking else ""
    if thinking_end and thinking_end in format.structural_markers:
        markers = alternatives(format.structural_markers)
        ends += f"|{re.escape(thinking_end)}(?!{markers})"
    return re.compile(ends)
