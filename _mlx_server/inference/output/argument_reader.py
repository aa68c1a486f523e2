"""Reads the arguments of one tool call, piece by piece."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from _mlx_server.inference.constrained.schema import ParameterTypes, coerce
from _mlx_server.inference.output.call_syntax import (
    BARE_KEY,
    MAX_HEAD,
    CallSyntax,
    ObjectSyntax,
    TagSyntax,
    ValueSyntax,
)
from _mlx_server.inference.output.call_writer import CallWriter
from _mlx_server.inference.output.json_calls import read_json
from _mlx_server.inference.output.marks import Marks, comes_next
from _mlx_server.inference.output.value_end import TextBuffer, ValueEnd

T = TypeVar("T")
_Span = tuple[int, int, int, int]  # of a string: its beginning, its text's, its text's end, its end
Steps = Generator[None, None, T]  # reads one thing; yields whenever it needs more text

_ESCAPE = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\."
_HALF_ESCAPE = (
    r"\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?\Z"
)
_HALF_KEY = re.compile(r'(?:"[^"\s]*(?:"\s*:?\s*)?)?')
_HALF_TAGS = re.compile(r"\s*+.{0,150}")
_KEY = re.compile(rf"(?<=[{{,])\s*{BARE_KEY}")
_CLOSING = {"{": "}", "[": "]", "(": ")"}


class _Found(NamedTuple):
    """Where a value ends that is no string, which brackets are missing there because of an end tag
    or the text's end, and its strings in quotes of the family's own."""

    end: int
    missing: str
    strings: list[_Span]


class ArgumentReader:
    """Reads arguments from `buffer` and writes them with `writer`, as soon as they are certain:
    text of a string as it comes; other values, and strings that the tool's schema may turn into
    something else, when they are complete. A value that is no JSON becomes the string of its text.

    Its methods are generators that yield when they need more text in the buffer."""

    def __init__(self, buffer: TextBuffer, writer: CallWriter, call_tags: tuple[str, str]):
        self._buffer, self._writer, self._call_tags = buffer, writer, call_tags
        self._end_tag = call_tags[1]
        self._argument = re.compile("")  # what precedes an argument's value in this call
        # The names of the tool's arguments, and of those that have not come yet
        self._declared: set[str] = set()
        self._missing: set[str] = set()

    def read(self, syntax: CallSyntax, types: ParameterTypes) -> Steps[bool]:
        """Read the arguments behind a call's head; returns whether they are complete. `types` are
        the JSON types that the tool's schema allows. Behind it the buffer begins with the call's
        tail or, when an argument is malformed, with what was not understood."""
        self._argument, self._declared = syntax.argument, set(types)
        self._missing = set(types)
        if isinstance(syntax, TagSyntax):
            return self._read_tags(syntax, types)
        return self._read_object(syntax, types)

    def skip_object(self, syntax: ObjectSyntax) -> Steps[None]:
        """Read to the end of the JSON object that the buffer begins inside of, if it ends soon: an
        id may be left of it. A further search would be made again behind each call."""
        found = yield from self._find_end(syntax, ["}"], MAX_HEAD)
        if not found.missing:
            self._buffer.text = self._buffer.text[found.end :]

    def _read_object(self, syntax: ObjectSyntax, types: ParameterTypes) -> Steps[bool]:
        buffer, bracket = self._buffer, syntax.arguments_end[0]
        while True:
            buffer.text = buffer.text.lstrip(" \t\r\n,")
            if buffer.text.startswith(bracket):
                buffer.text = buffer.text[len(bracket) :]
                return True
            argument = syntax.argument.match(buffer.text, 0, MAX_HEAD)
            if argument is None:
                if self._gives_up(_HALF_KEY.fullmatch(buffer.text) is not None):
                    return False
                yield
                continue
            key = _unescape(argument[1])
            self._begin_argument(key)
            buffer.text = buffer.text[argument.end() :]
            quote = next((mark for mark in syntax.quotes if buffer.text.startswith(mark)), "")
            if quote:
                buffer.text = buffer.text[len(quote) :]
                yield from self._read_string(syntax.value(quote), types[key])
            else:
                found = yield from self._find_end(syntax, [])
                text, buffer.text = buffer.text[: found.end], buffer.text[found.end :]
                source = _with_json_strings(text, found.strings) if syntax.own_quotes else text
                self._writer.write_value(_parse_value(source, found.missing, text), text.strip())

    def _read_tags(self, syntax: TagSyntax, types: ParameterTypes) -> Steps[bool]:
        buffer = self._buffer
        following = (*syntax.next_argument, *syntax.arguments_end)
        while True:
            argument = syntax.argument.match(buffer.text, 0, MAX_HEAD)
            if argument is None:
                if comes_next(buffer.text, (*syntax.arguments_end, self._end_tag), last=False):
                    return True
                half = _HALF_TAGS.fullmatch(buffer.text) and comes_next(
                    buffer.text, following, True
                )
                if self._gives_up(bool(half)):
                    return False
                yield
                continue
            key = argument[1].strip()
            self._begin_argument(key)
            buffer.text = buffer.text[argument.end() :]
            value = syntax.value(key, argument[0])
            if argument.re.groups > 1 and argument[2] not in (None, "true", "string"):
                text = yield from self._collect(value)
                self._writer.write_value(_parse_value(text), text)
            else:
                yield from self._read_string(value, types[key])

    def _gives_up(self, half: bool) -> bool:
        """Whether the next argument will never come. `half` tells that the buffer holds at most
        the beginning of one, which is dropped if no more comes."""
        text, end_tag = self._buffer.text, self._end_tag
        closed = bool(end_tag) and end_tag in text
        if self._buffer.ended and half and not closed:
            self._buffer.text = ""
        return self._buffer.ended or closed or len(text) >= MAX_HEAD

    def _begin_argument(self, key: str) -> None:
        self._missing.discard(key)
        self._writer.write_key(key)

    def _is_expected(self, text: str) -> bool | None:
        """Whether a text begins with an argument that the tool has and that has not come yet; None
        while more text may tell."""
        argument = self._argument.match(text.lstrip(" \t\r\n,"), 0, MAX_HEAD)
        if argument is None:
            return False if self._buffer.ended or len(text) >= MAX_HEAD else None
        return not self._declared or argument[1].strip() in self._missing

    def _read_string(self, value: ValueSyntax, types: set[str]) -> Steps[None]:
        """Read a value that is text. It streams if it may be a string."""
        if not types or "string" in types:
            self._writer.write_quote()
            yield from self._read_text(value, self._writer.write_text)
            self._writer.write_quote()
        else:
            text = yield from self._collect(value)
            self._writer.write_value(coerce(text, types), text)

    def _collect(self, value: ValueSyntax) -> Steps[str]:
        pieces: list[str] = []
        yield from self._read_text(value, pieces.append)
        return "".join(pieces)

    def _read_text(self, value: ValueSyntax, write: Callable[[str], None]) -> Steps[None]:
        """Read text up to where its value ends and `write` it; JSON's escapes are resolved. A
        call's end tag that ends the value, too, is left in the buffer."""
        buffer = self._buffer
        value_end = ValueEnd(value, self._call_tags, self._is_expected)
        marks = Marks(value_end.marks)
        up_to_mark = _up_to(marks.texts, value.escapes)
        while True:
            found = up_to_mark.match(buffer.text)
            assert found is not None  # it matches any text
            text, mark = found.groups()
            if not mark and not buffer.ended:
                text = text[: len(text) - marks.partial_length(text)]
            write(_unescape(text) if value.escapes else text)
            value_end.pass_text(text)
            buffer.text = buffer.text[len(text) :]
            if mark in marks.texts:
                rest = buffer.text[len(mark) :]
                over = value_end.is_at(mark, rest, buffer)
                if over:
                    buffer.text = rest if mark in value.ends else buffer.text
                    return
                if over is False:
                    write(mark)
                    buffer.text = rest
                    continue
            elif buffer.ended:
                buffer.text = ""  # at most half an escape is left
                return
            yield

    def _find_end(
        self, syntax: ObjectSyntax, closing: list[str], most: int = sys.maxsize
    ) -> Steps[_Found]:
        """Where the value ends that the buffer begins with. No more than `most` characters are
        searched. `closing` are the closing brackets of the objects that the buffer begins inside
        of: then it is these that end."""
        buffer, quotes, strings = self._buffer, syntax.quotes, list[_Span]()
        waited_for = Marks((*quotes, self._end_tag))
        outside = Marks((*quotes, *"{}[](),", self._end_tag)).pattern
        position = 0
        while True:
            quote = closing[-1] if closing and closing[-1] in quotes else ""
            marks = _in_string(quote) if quote else outside
            found = marks.search(buffer.text, position, most)
            if found is None:
                if buffer.ended or len(buffer.text) >= most:
                    return _Found(len(buffer.text), "".join(reversed(closing)), strings)
                unsure = max(1, waited_for.partial_length(buffer.text))
                position = max(position, len(buffer.text) - unsure)
                yield
                continue
            mark = found[0]
            if not quote and (mark == self._end_tag or not closing and mark in "}]),"):
                return _Found(found.start(), "".join(reversed(closing)), strings)
            position = found.end()
            if syntax.own_quotes and mark in quotes:
                end, position = yield from self._find_string_end(syntax.element(mark), position)
                strings.append((found.start(), found.end(), end, position))
            elif not quote and (mark in _CLOSING or mark in quotes):
                closing.append(_CLOSING.get(mark, mark))
            elif mark != "," and not mark.startswith("\\"):
                closing.pop()
            else:
                continue
            if not closing:
                return _Found(position, "", strings)

    def _find_string_end(self, value: ValueSyntax, position: int) -> Steps[tuple[int, int]]:
        """Where the text of a string within an array or an object ends, which begins at a position
        of the buffer, and where its quote does. An end tag may end it, too."""
        buffer, value_end = self._buffer, ValueEnd(value, self._call_tags, lambda text: False)
        marks = Marks(value_end.marks)
        while True:
            found = marks.pattern.search(buffer.text, position)
            if found is None and buffer.ended:
                return len(buffer.text), len(buffer.text)
            unsure = marks.partial_length(buffer.text)
            reached = found.start() if found else max(position, len(buffer.text) - unsure)
            value_end.pass_text(buffer.text[position:reached])
            position = reached
            if found is None:
                yield
                continue
            rest = buffer.text[found.end() : found.end() + 2 * ValueEnd.FAR]
            over = value_end.is_at(found[0], rest, buffer)
            if over:
                return position, found.end() if found[0] in value.ends else position
            if over is None:
                yield
            else:
                position = found.end()


@functools.lru_cache(256)
def _up_to(marks: tuple[str, ...], escapes: bool) -> re.Pattern[str]:
    """Matches text, and behind it a mark, half an escape or the text's end."""
    ends = "|".join([*map(re.escape, marks), *[_HALF_ESCAPE] * escapes, r"\Z"])
    text = rf"(?:[^\\]|{_ESCAPE})*?" if escapes else ".*?"
    return re.compile(f"({text})({ends})", re.DOTALL)


@functools.lru_cache(16)
def _in_string(quote: str) -> re.Pattern[str]:
    """Matches the quote that ends a string, or an escape."""
    return re.compile(rf"\\.|{re.escape(quote)}", re.DOTALL)


def _unescape(text: str) -> str:
    """The text that a quoted string stands for. A backslash that begins no escape is one."""

    def resolve(escape: re.Match[str]) -> str:
        try:
            return str(json.loads(f'"{escape[0]}"'))
        except ValueError:
            return "'" if escape[0] == "\\'" else escape[0]

    return re.sub(_ESCAPE, resolve, text, flags=re.DOTALL)


def _parse_value(source: str, missing: str = "", text: str | None = None) -> Any:
    """The JSON or Python value that `source` spells, if need be with the closing brackets it is
    `missing`; else the `text` that it was made from."""
    for whole in (source.strip(), source.strip() + missing):
        for parse in (_parse_json, ast.literal_eval):
            try:
                return parse(whole)
            except Exception:  # literal_eval fails with almost any type of exception
                continue
    return (source if text is None else text).strip()


def _parse_json(text: str) -> Any:
    value, rest = read_json(text)
    if rest.strip():
        raise ValueError("more than one value")
    return value


def _with_json_strings(text: str, strings: list[_Span]) -> str:
    """An object in which `strings` stand and keys within nothing, as JSON."""
    pieces, position = [], 0
    for start, begin, end, behind in [*strings, (len(text),) * 4]:
        pieces.append(_KEY.sub(lambda key: f"{json.dumps(key[1])}:", text[position:start]))
        if begin > start:
            pieces.append(json.dumps(text[begin:end]))
        position = behind
    return "".join(pieces)
