"""Reads the text behind a call tag, piece by piece, into the events of tool calls."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from _mlx_server.inference.constrained.schema import ParameterTypes, coerce
from _mlx_server.inference.output.argument_reader import ArgumentReader, Steps
from _mlx_server.inference.output.call_syntax import MAX_HEAD, CallSyntax, ObjectSyntax
from _mlx_server.inference.output.call_writer import CallWriter
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.json_calls import CutShort, parse_json_calls, read_json
from _mlx_server.inference.output.marks import Marks, comes_next
from _mlx_server.inference.output.value_end import TextBuffer
from _mlx_server.inference.protocol import Event


class CallReader:
    """Reads the text behind a call tag, in pieces of any size, into the events of one or several
    calls. `call_tags` are this tag and its end tag; `types` has the name of each declared tool and
    the types of its parameters.

    A call that is cut off (by `max_tokens`, say) or malformed in the middle ends there: its object
    holds all that has arrived, the last value as far as it goes, and `cut` is set.

    What each piece costs does not depend on how much came before it: a call's head is complete
    within MAX_HEAD characters, and a text in which more than MAX_TAGS tags are found before it is
    a call is none. Otherwise a model that repeats itself would be read again from every tag.
    """

    MAX_TAGS = 16

    def __init__(
        self,
        format: OutputFormat,
        call_tags: tuple[str, str],
        types: Mapping[str, ParameterTypes],
        parallel: bool = True,
    ):
        self.cut = False
        self._format, self._parallel = format, parallel
        self._start_tag, self._end_tag = call_tags
        self._types = types
        # The tags before the first call: their number, and where the next ones are looked for
        self._opening = Marks((self._start_tag, *format.line_starts))
        self._tags = self._counted = 0
        self._buffer = TextBuffer()
        self._writer = CallWriter()
        self._arguments = ArgumentReader(self._buffer, self._writer, call_tags)
        self._steps = self._read_block()

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The declared names, by themselves and in lower case."""
        return {name.lower(): name for name in self._types} | {name: name for name in self._types}

    @functools.cached_property
    def _next_calls(self) -> set[str]:
        return {
            start.replace("NAME", name)
            for syntax in self._format.syntaxes
            for start in syntax.next_call
            for name in self._types
        }

    @property
    def rest(self) -> str:
        """The text that was not understood yet; when the calls are over, the text behind them."""
        return self._buffer.text

    def read(self, text: str, last: bool, cut: bool = False) -> tuple[list[Event], bool]:
        """Take the next piece of text, the `last` one if no more will come, which may be because
        the answer was `cut`; returns the events that have become certain and whether the calls are
        over. Raises ValueError, with all of the text in `rest`, when it is no call."""
        self._buffer.text += text
        self._buffer.ended, self._buffer.cut = last, cut
        over = last
        try:
            next(self._steps)
        except StopIteration:
            over = True
        return self._writer.take_events(), over

    def _read_block(self) -> Steps[None]:
        """Read calls up to the end tag or, where there is none, to what can be no call."""
        buffer, end_tag = self._buffer, self._end_tag
        syntax, searched, skipped, headless = None, 0, 0, False
        while True:
            if syntax:
                tail = syntax.tail.match(buffer.text)
                buffer.text = buffer.text[tail.end() if tail else 0 :]
                if not end_tag and not self._may_begin():
                    return
            if not headless and (head := self._take_head()):
                syntax, searched, skipped = head[0], 0, 0
                yield from self._read_call(*head)
                if not self._parallel:
                    return
                if self.cut and not (end_tag and buffer.text.startswith(end_tag)):
                    return
                continue
            # When the head's window is full, no more text will change what it holds.
            headless = len(buffer.text) >= self._head_window
            end = buffer.text.find(end_tag, searched) if end_tag else -1
            self._check_hope(end, headless, skipped)
            if end >= 0 or buffer.ended:
                if self._end_block(end, bool(skipped)):
                    return
                searched, skipped = end + len(end_tag), skipped + 1
            else:
                searched = max(searched, len(buffer.text) - len(end_tag) + 1)
                yield

    @property
    def _head_window(self) -> int:
        return MAX_HEAD + len(self._start_tag)

    def _check_hope(self, end: int, headless: bool, skipped: int) -> None:
        """Raises ValueError if what the buffer holds before `end`, which is below 0 as long as no
        end tag is known, cannot become a call."""
        if self._writer.calls:
            return
        text = self._buffer.text
        limit = end if end >= 0 else len(text)
        while tag := self._opening.pattern.search(text, self._counted, limit):
            self._tags, self._counted = self._tags + 1, tag.end()
        self._counted = max(self._counted, limit - self._opening.longest + 1)
        if max(self._tags, skipped) > self.MAX_TAGS:
            raise ValueError("too many tags")
        if headless and self._format.parse is None:
            raise ValueError("no head")

    def _take_head(self) -> tuple[CallSyntax, str] | None:
        """The syntax of the call that the buffer begins with, and the name of its tool, if that is
        declared. The end tag of the call before it may be missing."""
        text = self._buffer.text
        begins = self._writer.calls and self._end_tag and text.startswith(self._start_tag)
        start = len(self._start_tag) if begins else 0
        for syntax in self._format.syntaxes:
            head = syntax.head.match(text, start, start + MAX_HEAD)
            name = head[1].strip() if head else ""
            known = self._names.get(name) or self._names.get(name.lower())
            if head and known:
                self._buffer.text = text[head.end() :]
                return syntax, known
        return None

    def _may_begin(self) -> bool:
        """Whether what follows a call can be the beginning of another."""
        text = self._buffer.text
        return not text or any(
            start.startswith(text) or text.startswith(start) for start in self._next_calls
        )

    def _read_call(self, syntax: CallSyntax, name: str) -> Steps[None]:
        """Read one call behind its head, to the end of the object its arguments stand in."""
        self._writer.begin_call(name)
        complete = yield from self._arguments.read(syntax, self._types[name])
        self._writer.end_call()
        self.cut = self.cut or not complete
        if complete and isinstance(syntax, ObjectSyntax) and syntax.enclosed:
            yield from self._arguments.skip_object(syntax)

    def _end_block(self, end: int, skipped: bool) -> bool:
        """The block is over, at the end tag at `end` or, below 0, with the answer. What is left of
        it may be calls that can only be read as a whole. `skipped` tells that an earlier end tag
        was taken for a part of a value; returns False when this one is, too."""
        buffer, tagged = self._buffer, end >= 0
        text = buffer.text[:end] if tagged else buffer.text
        try:
            if skipped and re.search(self._end_tag_and_start_tag, text):
                raise ValueError("the end tag that was skipped did end a call: another follows")
            if not tagged and self._end_tag and self._format.parse is not parse_json_calls:
                raise ValueError("cut off")
            self._parse_block(text)
        except ValueError as error:
            if self._writer.calls == 0:
                if tagged and isinstance(error, CutShort):
                    return False
                raise
            is_end = tagged or comes_next(text, [self._end_tag], last=True)
            if "{" in text or "<" in text or not is_end:
                return True  # what is left is text
        buffer.text = buffer.text[end + len(self._end_tag) :] if tagged else ""
        return True

    @property
    def _end_tag_and_start_tag(self) -> str:
        return rf"{re.escape(self._end_tag)}\s*+{re.escape(self._start_tag)}"

    def _parse_block(self, text: str) -> None:
        """Write the calls that the format's `parse` finds in `text`. Raises ValueError, having
        written nothing, unless all of them are right."""
        try:
            calls = self._parsed_calls(text)
        except CutShort:
            raise
        except Exception as error:  # mlx-lm's parsers fail with almost any type of exception
            raise ValueError("not a call") from error
        if not calls:
            raise ValueError("no call")
        for name, arguments in calls if self._parallel else calls[:1]:
            self._writer.begin_call(name)
            for key, value in arguments.items():
                self._writer.write_key(key)
                self._writer.write_value(coerce(value, self._types[name][key]), value)
            self._writer.end_call()

    def _parsed_calls(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        """Names of declared tools and arguments that can be sent. Raises any exception if there are
        others in `text`."""
        if self._format.parse is None:
            return []
        calls = []
        for name, arguments in self._format.parse(text, self._typed_tools()):
            if isinstance(arguments, str) and arguments.strip():
                arguments = read_json(arguments.strip())[0]
            arguments = dict((arguments or {}).items())
            # Raises for half a surrogate pair, too.
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
            name = self._names[name if name in self._names else name.lower()]
            calls.append((name, arguments))
        return calls

    def _typed_tools(self) -> list[dict[str, Any]]:
        """The tools as mlx-lm's parsers want them: each property with at most one type."""
        tools = []
        for name, types in self._types.items():
            properties = {key: {"type": min(one)} for key, one in types.items() if len(one) == 1}
            parameters = {"type": "object", "properties": properties}
            tools.append({"type": "function", "function": {"name": name, "parameters": parameters}})
        return tools
